"""Schedules: texts, curves, keyframes that are held, and the way from noise to progress."""

from __future__ import annotations

import math

import pytest

from oft_core import Schedule, ScheduleError
from oft_core.schedule import Cursor, from_keyframes, progress_of


def values(schedule: Schedule, *progress: float) -> list[float]:
    return [round(schedule.at(p), 6) for p in progress]


def test_named_curves() -> None:
    assert values(Schedule.parse("constant"), 0, 0.3, 1) == [1, 1, 1]
    assert values(Schedule.parse("linear"), 0, 0.3, 1) == [0, 0.3, 1]
    assert values(Schedule.parse("cosine"), 0, 0.25, 0.5, 1) == [0, round((1 - math.cos(math.pi / 4)) / 2, 6), 0.5, 1]
    assert Schedule.parse("") == Schedule.parse(" Constant ") == Schedule()


def test_points() -> None:
    assert values(Schedule.parse("0:0, 0.3:1, 1:0.5"), 0, 0.15, 0.3, 0.65, 1) == [0, 0.5, 1, 0.75, 0.5]
    assert values(Schedule.parse("0.2:2, 0.6:-1"), 0, 0.2, 0.4, 0.6, 1) == [2, 2, 0.5, -1, -1]
    assert values(Schedule.parse("step 0.2:2, 0.6:-1"), 0, 0.1, 0.2, 0.59, 0.6, 1) == [2, 2, 2, 2, -1, -1]
    assert values(Schedule.parse("cosine 0:1, 1:0"), 0, 0.5, 1) == [1, 0.5, 0]
    assert Schedule.parse("0.3:1 0:0\n1:.5") == Schedule.parse("0:0,0.3:1,1:0.5") == Schedule.parse("０：0，0.3：1；1:0.5")
    assert values(Schedule.parse("0.5:0.7"), 0, 1) == [0.7, 0.7]


def test_outside_of_start_and_end_there_is_none() -> None:
    assert values(Schedule.parse("constant", 0.2, 0.6), 0, 0.19, 0.2, 0.6, 0.61, 1) == [0, 0, 1, 1, 0, 0]
    assert values(Schedule.parse("linear", 0.2, 0.6), 0.1, 0.2, 0.4, 0.6, 0.7) == [0, 0, 0.5, 1, 0]
    assert values(Schedule.parse("0:0, 1:1", 0.2, 0.6), 0.1, 0.2, 0.4, 0.6, 0.7) == [0, 0.2, 0.4, 0.6, 0]
    assert values(Schedule.parse("linear", 0.5, 0.5), 0.4, 0.5, 0.6) == [0, 1, 0]


@pytest.mark.parametrize("text", ["constant", "linear", "cosine", "0:0, 0.3:1, 1:0.5", "step 0:1, 0.5:0", "cosine 0.1:-1, 0.9:2.125"])
def test_text_comes_back(text: str) -> None:
    once = Schedule.parse(text)
    again = Schedule.parse(str(once))
    assert [again.at(i / 40) for i in range(41)] == [once.at(i / 40) for i in range(41)]
    assert str(again) == str(once)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cubic", "Unknown curve"), ("0:0, 0.3", "cannot be read"), ("0:0, 1.5:1", "1.5:1"), ("-0.1:1", "-0.1"), ("0:x", "0:x"),
        ("0:nan", "0:nan"), ("0:0, 0:1", "same progress"), ("step", "needs points"), ("constant 0:1", "takes no points"),
    ],
)
def test_bad_texts_are_explained(text: str, words: str) -> None:
    with pytest.raises(ScheduleError, match=words) as error:
        Schedule.parse(text)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("window", [(0.6, 0.2), (-0.1, 1), (0, 1.2)])
def test_bad_ranges_are_explained(window: tuple[float, float]) -> None:
    with pytest.raises(ScheduleError, match="range"):
        Schedule.parse("constant", *window)


@pytest.mark.parametrize("text", ["linear", "cosine", "0:0, 0.3:1, 1:0.5", "step 0:1, 0.45:0.2", "constant"])
@pytest.mark.parametrize("window", [(0.0, 1.0), (0.2, 0.7)])
def test_steps_stay_near_the_curve(text: str, window: tuple[float, float]) -> None:
    schedule = Schedule.parse(text, *window)
    steps = schedule.sampled(50)
    assert steps[0][0] == 0 and len(steps) < 60
    for i in range(101):
        p = i / 100
        held = [s for start, s in steps if start <= p + 1e-6][-1]
        assert abs(held - schedule.at(p)) < 0.07, p


def test_keyframes_hold_for_their_steps() -> None:
    frames = from_keyframes([(0.0, 1.0, 1), (0.1, 2.0, 3), (0.15, 3.0, 0), (0.9, 4.0, 2)])
    cursor = Cursor(frames, 0.0)
    got = [cursor.at(i / 10) for i in range(11)]
    assert got == [1, 2, 2, 2, 3, 3, 3, 3, 3, 4, 4]
    assert [frames.at(i / 10) for i in range(3)] == [1, 2, 3], "without a cursor nothing is held"
    twice = Cursor(frames, 0.0)
    assert [twice.at(i // 2 / 10) for i in range(10)] == [1, 1, 2, 2, 2, 2, 2, 2, 3, 3], "one step, two evaluations"
    late = Cursor(frames, 0.5)
    assert [late.at(p) for p in (0.5, 0.6, 0.9)] == [3, 3, 4], "what begins before the run is not held"
    with pytest.raises(ScheduleError, match="no keyframes"):
        from_keyframes([])


def test_progress_is_the_inverse_of_the_noise_schedule() -> None:
    def flow(percent: float) -> float:
        return 1.0 if percent <= 0 else 0.0 if percent >= 1 else 3 * (1 - percent) / (1 + 2 * (1 - percent))

    def eps(percent: float) -> float:
        return 999999999.9 if percent <= 0 else 0.0 if percent >= 1 else 14.6 * (1 - percent) ** 3 + 0.03

    for curve in (flow, eps):
        for p in (0.001, 0.25, 0.5, 0.999):
            assert progress_of(curve(p), curve) == pytest.approx(p, abs=1e-9)
        assert progress_of(0.0, curve) == 1
    assert progress_of(1.0, flow) == 0 and progress_of(20.0, eps) == 0 and progress_of(14.63, eps) < 1e-9
