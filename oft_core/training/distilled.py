"""Models that were distilled to draw in few steps: how they are known, and what training them does.

A training on pictures teaches such a model the usual way from noise to picture again, so that the short way it was
distilled to take gets lost bit by bit: pictures in few steps become blurred, in many they are good (as the authors of
training adapters for Z-Image-Turbo and FLUX.1-schnell describe it).
"""

from __future__ import annotations

import re

#: Words in names of files, between other signs than letters.
_MARKS = re.compile(
    r"(?<![a-z])(turbo|lightning|hyper|lcm|schnell|dmd2?|tcd|pcm|distill(?:ed)?|causvid|lightx2v|self[-_ ]?forcing|klein|[1248][-_ ]?steps?)"
    r"(?![a-z])"
)
#: Names of models that were brought back, or that a distilled one of the same name was made from.
_UNDONE = re.compile(r"de[-_ ]?(turbo|distill)|undistill|open[-_ ]?flux|(klein|schnell|turbo)([-_ ]?\d+b)?[-_ ]?base|base[-_ ]?(klein|turbo)")


def few_steps(file: str, kind: str = "") -> str:
    """The word by which a model is known as distilled to few steps; "" if by none.

    file: name of the model's file, may be empty.   kind: the host's class of the model.
    """
    name = file.lower()
    if _UNDONE.search(name):
        return ""
    found = _MARKS.search(name)
    if found:
        return found[1]
    return "schnell" if kind == "FluxSchnell" else ""


def remark(word: str) -> str:
    """What to know and to do, a few sentences for the report."""
    return (
        f"The model is distilled to few steps ('{word}'), and training makes it forget that: draw samples in as few steps as it is "
        "made for (sample_steps, sample_cfg 1) and stop when they blur; a low learning rate and few steps hurt less. Better train on "
        "the model that it was distilled from and use the file on both, or put a training adapter (a LoRA that undoes the "
        "distillation) before Train OFT and leave it away when drawing."
    )
