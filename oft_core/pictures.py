"""Pictures of what a file does: a map of angles over layers and blocks, their histogram, bars for each list of blocks.

Pillow only. Every picture has a background of its own, so that it can be read on light and dark pages alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .adapter import Adapter, Binding
from .errors import printable
from .profile import Between, LayerProfile, between, profile

PAPER, INK, FAINT, GRID = (250, 250, 248), (34, 36, 40), (120, 124, 130), (222, 223, 224)
BAR, MEAN = (58, 120, 170), (214, 96, 40)
#: Colours from no turn to the largest one; even in lightness, and apart for colour-blind people.
SCALE = np.array([
    (244, 244, 240), (214, 226, 196), (160, 205, 170), (98, 176, 163), (52, 139, 155), (38, 100, 142), (44, 61, 116), (38, 24, 74),
])  # fmt: skip
WIDTH, MARGIN, LABELS, MAP = 1200, 24, 190, 560
#: Rows of the map: the most pixels that one takes, and that all take. More layers than that share rows.
ROW, TALLEST = 14, 900
#: Rows of so many pixels have the layers' names beside them.
NAMED = 12
#: Lists of blocks that have a place of their own; the smallest of more are put together.
GROUPS = 40
HISTOGRAM = 170


@dataclass(frozen=True)
class Panel:
    """A map. rows: name -> values (blocks,), in order.   title: above it."""

    title: str
    rows: Sequence[np.ndarray | None]


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font; older versions have it in one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def readable(text: str, most: int = 90) -> str:
    """Text that Pillow's own font can draw, shortened in the middle."""
    text = printable(text, 1000).encode("latin-1", "replace").decode("latin-1")
    return text if len(text) <= most else f"{text[: most // 2 - 1]}...{text[-(most // 2 - 2) :]}"


def adapter_picture(adapter: Adapter, layers: Sequence[LayerProfile] | None = None, model: str = "") -> Image.Image:
    """One file. layers: from `profile`, if they are known already.   model: what it is on, for the title."""
    layers = profile(adapter) if layers is None else layers
    angles = [p.largest.numpy() for p in layers]
    top = max((float(a.max()) for a in angles), default=0.0)
    mean = float(np.concatenate([p.planes.numpy() for p in layers]).mean()) if layers else 0.0
    facts = f"{adapter.title}, {len(layers)} layers, largest angle {top:.1f}°, mean {mean:.1f}°"
    idle = sum(not p.learnt for p in layers)
    if idle:
        facts += f", {idle} layers learnt nothing"
    sheet = _Sheet(adapter.name, facts if not model else f"{facts}; on {readable(model, 40)}")
    sheet.maps(layers, [Panel("largest angle of each block", angles)], top, bars=True)
    sheet.histogram(np.concatenate([p.planes.numpy() for p in layers]) if layers else np.zeros(0))
    return sheet.finished()


def comparison_picture(first: Adapter, second: Adapter, bind: Callable[[Adapter], Binding] | None = None) -> Image.Image:
    """Two files side by side with one scale, and the angle from one to the other. bind: as for `between`."""
    profiles = [{p.name: p for p in profile(a, bind(a) if bind else None)} for a in (first, second)]
    apart = {b.name: b for b in between(first, second, bind)}
    names = [*profiles[0], *(n for n in profiles[1] if n not in profiles[0])]
    merged = [profiles[0].get(n) or profiles[1][n] for n in names]
    maps = [[p[n].largest.numpy() if n in p else None for n in names] for p in profiles]
    third = [_angle(apart.get(n)) for n in names]
    top = max((float(a.max()) for column in (*maps, third) for a in column if a is not None), default=0.0)
    known = [b for b in apart.values() if b.angle is not None]
    facts = f"A: {readable(first.name, 40)}   B: {readable(second.name, 40)}   {len(known)} of {len(names)} layers compared"
    if known:
        facts += f", likeness {np.mean([b.likeness for b in known]):+.2f}"
    sheet = _Sheet("Two files", facts)
    sheet.maps(merged, [Panel("A", maps[0]), Panel("B", maps[1]), Panel("from A to B", third)], top)
    return sheet.finished()


def _angle(found: Between | None) -> np.ndarray | None:
    return None if found is None or found.angle is None else found.angle.numpy()


def coloured(share: np.ndarray) -> np.ndarray:
    """Shares 0..1 of the largest value -> RGB (..., 3) uint8."""
    at = np.clip(share, 0, 1) * (len(SCALE) - 1)
    low = np.minimum(at.astype(int), len(SCALE) - 2)
    part = (at - low)[..., None]
    return np.round(SCALE[low] * (1 - part) + SCALE[low + 1] * part).astype(np.uint8)


class _Sheet:
    """A picture that grows downwards."""

    def __init__(self, title: str, facts: str) -> None:
        self.image = Image.new("RGB", (WIDTH, 3000), PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.y = MARGIN
        self.write(MARGIN, readable(title, 80), 22, INK)
        self.y += 32
        self.write(MARGIN, readable(facts, 170), 13, FAINT)
        self.y += 30

    def write(self, x: float, text: str, size: int, colour: tuple[int, int, int], y: float | None = None, right: bool = False) -> None:
        face = font(size)
        if right:
            x -= self.pen.textlength(text, font=face)
        self.pen.text((x, self.y if y is None else y), text, font=face, fill=colour)

    def maps(self, layers: Sequence[LayerProfile], panels: Sequence[Panel], top: float, bars: bool = False) -> None:
        """Rows of layers, grouped by part and list of blocks, with a scale of degrees below."""
        room = WIDTH - 2 * MARGIN - LABELS
        width = MAP if bars else (room - 16 * (len(panels) - 1)) // len(panels)
        lefts = [MARGIN + LABELS + i * (width + 16) for i in range(len(panels))]
        for panel, left in zip(panels, lefts, strict=True):
            self.write(left, panel.title, 13, INK)
        if bars:
            self.write(MARGIN + LABELS + MAP + 20, "each block of the model: mean, largest", 13, INK)
        self.y += 22
        height = max(1, min(ROW, TALLEST // max(1, len(layers))))
        together = max(1, math.ceil(len(layers) / TALLEST))
        named = height >= NAMED
        for (component, group), members in _groups(layers):
            if named:
                self._label(component, group, [layers[i].number for i in members], self.y)
                self.y += 17
            begin = self.y
            for i in range(0, len(members), together):
                for panel, left in zip(panels, lefts, strict=True):
                    self._row([panel.rows[k] for k in members[i : i + together]], left, width, height, top)
                if named:
                    self.write(MARGIN + LABELS - 10, _short(layers[members[i]]), 10, FAINT, self.y, right=True)
                self.y += height
            if bars and together == 1:
                self._bars([layers[i] for i in members], MARGIN + LABELS + MAP + 20, begin, height, top)
            if not named:
                self._label(component, group, [layers[i].number for i in members], begin)
            self.y = max(self.y, begin + 16) + 6
        self._scale(lefts[0], min(width, MAP), top)

    def _row(self, layers: Sequence[np.ndarray | None], left: int, width: int, height: int, top: float) -> None:
        known = [_pixels(values, width) for values in layers if values is not None and len(values)]
        if not known:
            y = self.y + height // 2
            self.pen.line([(left, y), (left + width - 1, y)], fill=GRID)
            return
        line = coloured(np.max(known, axis=0) / max(top, 1e-9))
        self.image.paste(Image.fromarray(np.broadcast_to(line[None], (height, width, 3)).copy()), (left, self.y))

    def _bars(self, layers: Sequence[LayerProfile], left: int, y: int, height: int, top: float) -> None:
        """For each block of the model: a bar to the largest angle, a mark at the mean."""
        room = WIDTH - MARGIN - left
        at = 0
        while at < len(layers):
            end = at
            while end < len(layers) and layers[end].number == layers[at].number:
                end += 1
            some = layers[at:end]
            above, below = y + at * height, y + end * height - (1 if height > 2 else 0)
            largest, mean = max(p.top for p in some), float(np.mean([p.mean for p in some]))
            self.pen.rectangle((left, above, left + room * largest / max(top, 1e-9), max(above, below - 1)), fill=BAR)
            x = left + room * mean / max(top, 1e-9)
            self.pen.rectangle((x - 1, above, x + 1, max(above, below - 1)), fill=MEAN)
            at = end

    def _label(self, component: str, group: str, numbers: Sequence[int | None], y: int) -> None:
        known = [n for n in numbers if n is not None]
        words = f"{group} {min(known)}-{max(known)}" if known and min(known) < max(known) else f"{group} {known[0]}" if known else group
        name = words if component == "unet" else f"{component}: {words}"
        self.write(MARGIN + LABELS - 10, readable(name, 28), 12, INK, y, right=True)

    def _scale(self, left: int, width: int, top: float) -> None:
        self.y += 6
        line = coloured(np.linspace(0, 1, width))
        self.image.paste(Image.fromarray(np.broadcast_to(line[None], (10, width, 3)).copy()), (left, self.y))
        for i in range(5):
            x = left + (width - 1) * i / 4
            self.pen.line([(x, self.y + 10), (x, self.y + 14)], fill=FAINT)
            text = f"{top * i / 4:.3g}°"
            self.write(x - self.pen.textlength(text, font=font(12)) / 2, text, 12, FAINT, self.y + 16)
        self.y += 44

    def histogram(self, planes: np.ndarray) -> None:
        """How many planes turn how far, on a logarithmic scale of counts."""
        self.write(MARGIN + LABELS, "planes by angle (counts on a logarithmic scale)", 13, INK)
        self.y += 22
        left, width = MARGIN + LABELS, MAP
        top = float(planes.max()) if planes.size else 0.0
        counts, edges = np.histogram(planes, bins=70, range=(0, top or 1.0))
        most = math.log10(max(1, counts.max()) + 1)
        base = self.y + HISTOGRAM
        for power in range(math.ceil(most) + 1):
            y = base - HISTOGRAM * power / max(most, 1)
            if y >= self.y - 1:
                self.pen.line([(left, y), (left + width, y)], fill=GRID)
                self.write(left - 8, f"{10**power:,}", 11, FAINT, y - 6, right=True)
        for count, a, b in zip(counts, edges[:-1], edges[1:], strict=True):
            x0, x1 = (left + width * e / (edges[-1] or 1) for e in (a, b))
            if count:
                self.pen.rectangle((x0, base - HISTOGRAM * math.log10(count + 1) / max(most, 1), max(x0, x1 - 1), base), fill=BAR)
        for i in range(5):
            text = f"{edges[-1] * i / 4:.3g}°"
            self.write(left + width * i / 4 - self.pen.textlength(text, font=font(12)) / 2, text, 12, FAINT, base + 6)
        self.y = base + 30

    def finished(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, min(self.y + MARGIN, self.image.height)))


def _short(layer: LayerProfile) -> str:
    """Number of the block and the end of the name, as far as there is room."""
    end = layer.name.split(".") if "." in layer.name else layer.name.split("_")
    while len(end) > 2 and len(".".join(end)) > 26:
        end = end[1:]
    if end[0] == str(layer.number):
        end = end[1:]
    number = "" if layer.number is None else f"{layer.number}  "
    return number + readable(("." if "." in layer.name else "_").join(end), 30)


def _pixels(values: np.ndarray, width: int) -> np.ndarray:
    """The largest of the blocks that each pixel stands for, so that a single one is seen."""
    edges = np.linspace(0, len(values), width + 1)
    first = np.minimum(edges[:-1].astype(int), len(values) - 1)
    last = np.maximum(np.ceil(edges[1:]).astype(int), first + 1)
    return np.array([values[a:b].max() for a, b in zip(first, last, strict=True)])


def _groups(layers: Sequence[LayerProfile]) -> list[tuple[tuple[str, str], list[int]]]:
    """(component, list of blocks) -> indices of layers, in order."""
    counts = Counter((p.component, p.group) for p in layers)
    own = {key for key, _ in counts.most_common(GROUPS)}
    out: dict[tuple[str, str], list[int]] = {}
    for i, p in enumerate(layers):
        key = (p.component, p.group)
        out.setdefault(key if key in own else (p.component, "other"), []).append(i)
    return list(out.items())
