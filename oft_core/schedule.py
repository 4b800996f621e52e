"""Strength over the progress of sampling: curves, and ComfyUI's hook keyframes as a special case of them.

Progress runs from 0 (all noise) to 1 (finished picture) along the model's own noise schedule, as in ComfyUI's start and end percents.
"""

from __future__ import annotations

import bisect
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import ScheduleError

CURVES = ("constant", "linear", "cosine", "step")
_EXPECTED = "constant, linear, cosine, or points such as '0:0, 0.3:1, 1:0.5', with linear, cosine or step before them"
#: A step that lies on a point belongs to what comes after it; progress is known to about this.
_EPSILON = 1e-6


@dataclass(frozen=True)
class Schedule:
    """A factor on the strength for every progress.

    points: (progress, factor) in order; before the first and after the last the value stays.   shape: how to go from one to the
    next, ``linear``, ``cosine`` (half a wave, flat at both points) or ``step`` (the value holds until the next point).
    start, end: outside of them the factor is 0.   hold: for ``step``, how many model evaluations at different noise each point
    lasts at least, as ComfyUI's hook keyframes have it; () for none.
    """

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    shape: str = "linear"
    start: float = 0.0
    end: float = 1.0
    hold: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str, start: float = 0.0, end: float = 1.0) -> Schedule:
        """``constant``; ``linear`` or ``cosine`` (from 0 at ``start`` to 1 at ``end``); or points over the whole progress.

        Raises ScheduleError for anything else, progress outside of 0 to 1, or an end before the start.
        """
        if not 0 <= start <= end <= 1:
            raise ScheduleError("The schedule's range is not in order", found=f"{start:g} to {end:g}", expected="0 <= start <= end <= 1")
        plain = unicodedata.normalize("NFKC", text).strip().lower() or "constant"
        match = re.fullmatch(r"([a-z]*)\s*(.*)", plain, re.DOTALL)
        name, rest = match[1], match[2]
        if name and name not in CURVES:
            raise ScheduleError("Unknown curve", found=text, expected=_EXPECTED)
        if not rest:
            if name == "constant" or start == end:
                return cls(start=start, end=end)
            if name == "step":
                raise ScheduleError("A step curve needs points", found=text, expected="for instance 'step 0:0, 0.5:1'")
            return cls(((start, 0.0), (end, 1.0)), name, start, end)
        if name == "constant":
            raise ScheduleError("A constant curve takes no points", found=text, expected=_EXPECTED)
        return cls(_points(rest, text), name or "linear", start, end)

    def __str__(self) -> str:
        """The curve as text that ``parse`` reads, without start and end."""
        if len({factor for _, factor in self.points}) == 1 and self.points[0][1] == 1:
            return "constant"
        points = ", ".join(f"{at:.15g}:{factor:.15g}" for at, factor in self.points)
        return points if self.shape == "linear" else f"{self.shape} {points}"

    def at(self, progress: float) -> float:
        """The factor at a progress; ``hold`` is not in it, see ``Cursor``."""
        if not self.start - _EPSILON <= progress <= self.end + _EPSILON:
            return 0.0
        i = bisect.bisect_right(self.points, progress + _EPSILON, key=lambda point: point[0])
        if i == 0:
            return self.points[0][1]
        if i == len(self.points) or self.shape == "step":
            return self.points[i - 1][1]
        (a, low), (b, high) = self.points[i - 1], self.points[i]
        t = min(max((progress - a) / (b - a), 0.0), 1.0)
        if self.shape == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        return low + t * (high - low)

    def sampled(self, count: int = 50) -> list[tuple[float, float]]:
        """The curve as steps (progress, factor) for hosts that only know those: all points, and ``count`` places where it moves."""
        edges = {0.0, self.start, *(p for p, _ in self.points if self.start <= p <= self.end)}
        if self.shape != "step" and len(self.points) > 1:
            first, last = max(self.start, self.points[0][0]), min(self.end, self.points[-1][0])
            edges |= {first + (last - first) * i / count for i in range(count + 1)}
        steps: list[tuple[float, float]] = []
        for p in sorted(edges):
            if not steps or self.at(p) != steps[-1][1]:
                steps.append((p, self.at(p)))
        if self.end < 1:
            steps.append((self.end + 2 * _EPSILON, 0.0))
        return steps


def _points(text: str, whole: str) -> tuple[tuple[float, float], ...]:
    points = []
    for part in filter(None, re.split(r"[\s,;]+", re.sub(r"\s*:\s*", ":", text))):
        at, colon, factor = part.partition(":")
        try:
            point = (float(at), float(factor))
        except ValueError:
            point = (math.nan, math.nan)
        if not colon or not 0 <= point[0] <= 1 or not math.isfinite(point[1]):
            raise ScheduleError("A point of the curve cannot be read", found=part, expected=f"progress:factor in '{whole}', {_EXPECTED}")
        points.append(point)
    points.sort(key=lambda point: point[0])
    if len({at for at, _ in points}) < len(points):
        raise ScheduleError("Two points of the curve have the same progress", found=whole, expected=_EXPECTED)
    return tuple(points)


class Cursor:
    """A schedule's factor along one run of sampling: it remembers how long a point has been in force.

    first: the progress at which the run begins; points before it are not held.
    """

    def __init__(self, schedule: Schedule, first: float):
        self.schedule, self.first = schedule, first
        self._index, self._used, self._last = 0, 0, None

    def _wanted(self, index: int) -> int:
        at = self.schedule.points[index][0]
        return self.schedule.hold[index] if at > 0 and at >= self.first else 0

    def at(self, progress: float) -> float:
        """The factor for a model evaluation at this progress; evaluations at the same progress in a row are one."""
        schedule = self.schedule
        if not any(schedule.hold):
            return schedule.at(progress)
        points = schedule.points
        if progress != self._last:
            if self._used >= self._wanted(self._index):
                for i in range(self._index + 1, len(points)):
                    if points[i][0] > progress + _EPSILON:
                        break
                    self._index, self._used = i, 0
                    if self._wanted(i) > 0:
                        break
            self._used += 1
            self._last = progress
        return points[self._index][1] if schedule.start <= progress <= schedule.end + _EPSILON else 0.0


def progress_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The progress at which a model's noise is ``sigma``: the inverse of a falling function on 0 to 1, by bisection."""
    low, high = 0.0, 1.0
    if sigma <= percent_to_sigma(1.0):
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if percent_to_sigma(middle) > sigma:
            low = middle
        else:
            high = middle
    return high if high > 1e-9 else 0.0


def from_keyframes(keyframes: Sequence[tuple[float, float, int]]) -> Schedule:
    """ComfyUI's hook keyframes (start percent, strength, guaranteed steps), sorted by start. Raises ScheduleError for none."""
    if not keyframes:
        raise ScheduleError("There are no keyframes", expected="at least one")
    return Schedule(
        tuple((float(p), float(s)) for p, s, _ in keyframes), "step", hold=tuple(int(n) for *_, n in keyframes)
    )
