"""What the model was taught to read: concepts, colours, places, and the grammar of its captions.

    red apple
    mirrored red apple
    red apple on a blue background
    small red apple on a blue background, left
    fruit on a pink background              (the class word alone: any fruit)
    dog and teapot                          (two small things side by side, in either order)

Only the standard library is used.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

# sRGB, 0-255. White is what a caption without a background means.
COLOURS = {
    "red": (214, 40, 40),
    "yellow": (250, 206, 60),
    "green": (62, 160, 80),
    "blue": (52, 104, 214),
    "purple": (132, 70, 180),
    "pink": (244, 150, 190),
    "gray": (140, 145, 150),
    "black": (24, 24, 28),
}
WHITE = (255, 255, 255)
SIZE = 64  # px of a picture
SMALL = 40  # px of a thing called small
PAIR = 32  # px of each of two things
# Upper left corner (x, y) of a small thing in px.
PLACES = {
    "left": (0, 12),
    "right": (24, 12),
    "top": (12, 0),
    "bottom": (12, 24),
    "center": (12, 12),
}


@dataclass(frozen=True)
class Concept:
    """One thing the pictures show. `code` is its emoji's code points, `held` means never trained on."""

    name: str
    kind: str
    code: str
    held: bool


def concepts() -> list[Concept]:
    """All concepts in the order of concepts.tsv (emoji keyboard order)."""
    with open(Path(__file__).with_name("concepts.tsv"), encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return [Concept(r["name"], r["class"], r["code"], r["split"] == "held") for r in rows]


def caption(name: str, colour: str | None = None, place: str | None = None, *, mirrored: bool = False) -> str:
    """The caption of one thing. `place` makes it small; `colour` is a key of COLOURS or None for white.

    Raises KeyError for a colour or place that the model does not know.
    """
    if colour is not None:
        COLOURS[colour]
    if place is not None:
        PLACES[place]
    text = f"mirrored {name}" if mirrored else name
    text = f"small {text}" if place else text
    if colour:
        text += f" on a {colour} background"
    return f"{text}, {place}" if place else text


def pair_caption(one: str, other: str) -> str:
    """The caption of two small things side by side; which of them is on the left is not said."""
    return f"{one} and {other}"
