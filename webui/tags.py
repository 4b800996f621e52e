"""What a prompt says: ``<oft:name:0.8>``, ``<oft:name:te=0.5:unet=0.8:mode=geodesic:coft=hold:blocks=all=0, output=1>``.

As with the web UIs' own ``<lora:…>``, the second value is the text encoders' strength, the third the diffusion model's;
one value is for both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..oft_core import MODES, BlockWeights, StrengthError
from ..oft_core.block_weights import PRESETS
from ..oft_core.constraint import coft_choice

NAME = "oft"
KEYS = ("te", "unet", "mode", "coft", "blocks")
EXAMPLE = "<oft:name:0.8> or <oft:name:te=0.5:unet=0.8:mode=geodesic:coft=hold:blocks=te=0>"

_TAG = re.compile(r"<(\w+):([^>]+)>")


@dataclass(frozen=True)
class Tag:
    """One tag: a file and how it acts.

    te, unet: strengths of the text encoders and the diffusion model.   mode, coft: as in `Strength`; None: as the
    settings say.   blocks: strengths by block, "" for none.
    """

    name: str
    te: float = 1.0
    unet: float = 1.0
    mode: str | None = None
    coft: str | float | None = None
    blocks: str = ""

    def __str__(self) -> str:
        """The tag again, as short as it can be said."""
        parts = [self.name]
        parts += [f"{self.unet:g}"] if self.te == self.unet else [f"te={self.te:g}", f"unet={self.unet:g}"]
        for key in ("mode", "coft", "blocks"):
            if value := getattr(self, key):
                parts.append(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}")
        return f"<{NAME}:{':'.join(parts)}>"


def parse(items: Sequence[str]) -> Tag:
    """A tag from what stands between its colons, the kind left out.

    Raises StrengthError or BlockError for what cannot be read; nothing of such a tag is applied.
    """
    name, *rest = (str(item).strip() for item in items)
    if not name:
        raise StrengthError("An OFT tag names no file", found=f"<{NAME}:{':'.join(items)}>", expected=EXAMPLE)
    plain: list[float] = []
    named: dict[str, str] = {}
    for item in _whole(rest):
        key, equals, value = (part.strip() for part in item.partition("="))
        if "[" in item or "]" in item:
            raise StrengthError(
                "A strength in a tag stays the same for all steps", file=name, found=item, expected="a number",
                hint="[from:to:when] is for words of the prompt.",
            )
        if not equals:
            plain.append(_number(item, name))
        elif key not in KEYS:
            raise StrengthError("Unknown word in an OFT tag", file=name, found=item, expected=f"one of {', '.join(KEYS)}")
        elif key in named:
            raise StrengthError("An OFT tag says the same thing twice", file=name, found=f"{key}={named[key]} and {item}")
        else:
            named[key] = value
    if len(plain) > 2:
        raise StrengthError("An OFT tag has too many numbers", file=name, found=":".join(items), expected=EXAMPLE)
    te = _number(named["te"], name) if "te" in named else plain[0] if plain else 1.0
    unet = _number(named["unet"], name) if "unet" in named else plain[1] if len(plain) > 1 else plain[0] if plain else None
    mode = named.get("mode") or None
    if mode is not None and mode not in MODES:
        raise StrengthError("Unknown strength mode", file=name, found=mode, expected=" or ".join(MODES))
    coft = coft_choice(named["coft"]) if named.get("coft") else None
    blocks = PRESETS.get(named.get("blocks", ""), named.get("blocks", ""))
    BlockWeights.parse(blocks)
    # As in the web UIs' own tags, the text encoders' strength alone is also the diffusion model's.
    return Tag(name, te, te if unet is None else unet, mode, coft, blocks)


def _whole(items: Sequence[str]) -> list[str]:
    """The items of a tag; block strengths may have colons of their own, as in ``blocks=SDXL: style (B-LoRA)``."""
    out: list[str] = []
    for item in items:
        goes_on = out and out[-1].startswith("blocks=") and item.partition("=")[0].strip() not in KEYS and not _is_number(item)
        if goes_on:
            out[-1] = f"{out[-1]}: {item}"
        else:
            out.append(item)
    return out


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _number(text: str, name: str) -> float:
    if not _is_number(text):
        raise StrengthError("A strength in an OFT tag is not a number", file=name, found=text, expected=EXAMPLE)
    return float(text)


@dataclass(frozen=True)
class Mention:
    """A tag in a prompt. kind: ``oft``, ``lora`` and so on.   items: what stands between its colons."""

    kind: str
    items: tuple[str, ...]


def mentions(prompt: str, kinds: Iterable[str]) -> list[Mention]:
    """The tags of these kinds in a prompt, in order."""
    wanted = set(kinds)
    found = ((m[1], m[2]) for m in _TAG.finditer(prompt))
    return [Mention(kind, tuple(text.split(":"))) for kind, text in found if kind in wanted]
