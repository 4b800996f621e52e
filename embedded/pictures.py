"""Composing pictures: one or two things on a plain background, and the views of the subjects never trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .captions import COLOURS, PLACES, SIZE, SMALL, WHITE, Concept, concepts

SUBJECTS = Path(__file__).resolve().parent / "subjects"
# (size in px, x, y, mirrored): five views to train on and five others to compare with, all on white.
TRAIN_VIEWS = ((64, 0, 0, False), (56, 2, 6, True), (60, 4, 2, False), (52, 10, 8, True), (48, 12, 12, False))
HELD_VIEWS = ((64, 0, 0, True), (56, 6, 2, False), (60, 0, 4, True), (52, 4, 10, False), (48, 4, 8, True))
TRIGGER = "zwx"  # a word that the model never read


def scaled(picture: Image.Image, size: int) -> Image.Image:
    """Resized with premultiplied alpha, so that no dark fringe appears."""
    return picture if picture.width == size else picture.resize((size, size), Image.LANCZOS)


def compose(
    things: list[tuple[Image.Image, tuple[int, int]]], colour: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """RGBA pictures at (x, y) px over a plain background: uint8 [64, 64, 3]."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (*colour, 255))
    for picture, at in things:
        layer = Image.new("RGBA", (SIZE, SIZE))
        layer.paste(picture, at)
        canvas.alpha_composite(layer)
    return np.asarray(canvas.convert("RGB"))


def view(
    picture: Image.Image,
    *,
    flip: bool = False,
    colour: str | None = None,
    place: str | None = None,
    shift: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """One thing as its caption says; `shift` (px) moves it a little. uint8 [64, 64, 3]."""
    picture = ImageOps.mirror(picture) if flip else picture
    x, y = PLACES[place] if place else (0, 0)
    picture = scaled(picture, SMALL if place else SIZE)
    return compose([(picture, (x + shift[0], y + shift[1]))], COLOURS[colour] if colour else WHITE)


def subjects() -> list[Concept]:
    """The held-out concepts whose cut-out pictures are shipped."""
    return [c for c in concepts() if c.held]


def cutout(subject: Concept) -> Image.Image:
    """The 64 x 64 RGBA picture of a subject."""
    with Image.open(SUBJECTS / f"{subject.name.replace(' ', '_')}.png") as picture:
        return picture.convert("RGBA")


def views(subject: Concept, which: tuple[tuple[int, int, int, bool], ...] = TRAIN_VIEWS) -> list[np.ndarray]:
    """Views of a subject on white, uint8 [64, 64, 3] each."""
    art = cutout(subject)
    turned = [(scaled(ImageOps.mirror(art) if flip else art, size), (x, y)) for size, x, y, flip in which]
    return [compose([thing]) for thing in turned]


def prompt(subject: Concept) -> str:
    """Trigger and class word: what stands in the captions of a subject."""
    return f"{TRIGGER} {subject.kind}"
