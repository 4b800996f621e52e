"""Strengths by block: which part of a model a layer is in, and a short text that gives each part its own strength.

A text such as ``all=0, output.3-5=1, te=0.5, output/attention=0.7`` is a list of rules ``selector=factor``. The last rule that
matches a layer decides; a layer that none matches has factor 1. The factor multiplies the strength slider.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import BlockError
from .names import NameIndex

#: Kind of layer -> what in its path, under the model's original names, says so.
_KINDS = {
    "attention": re.compile(
        r"\battn\d?\.|_attn\.|\battention\.|Attention\.|_attention\.|single_blocks\.\d+\.linear[12]$|single_transformer_blocks\.\d+\.proj_out$"
    ),
    "self": re.compile(r"\battn1\.|self_attn|SelfAttention"),
    "cross": re.compile(r"\battn2\.to_|cross_attn|EncDecAttention"),
    "ff": re.compile(
        r"\.ff\.|\.ff_context\.|mlp|feed_forward|\.ffn\.|DenseReluDense|single_blocks\.\d+\.linear[12]$"
        r"|single_transformer_blocks\.\d+\.proj_out$"
    ),
    "projection": re.compile(r"(?:blocks\.\d+|middle_block|attentions)\.\d+\.proj_(?:in|out)$"),
    "modulation": re.compile(r"modulation|_mod\b|\bmod[CX]|norm\d?(?:_context)?\.linear$|emb_layers|time_emb_proj|\.adaln"),
}
KINDS = (*_KINDS, "conv")
#: Place -> path of a layer in it; a group is the block's number. The first that fits any of a layer's names wins.
_PLACES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("input", re.compile(r"input_blocks\.(\d+)\.")),
    ("middle", re.compile(r"middle_block\.(\d+)\.")),
    ("output", re.compile(r"output_blocks\.(\d+)\.")),
    ("double", re.compile(r"double_(?:blocks|layers)\.(\d+)\.")),
    ("single", re.compile(r"single_(?:blocks|layers)\.(\d+)\.")),
    ("joint", re.compile(r"joint_blocks\.(\d+)\.")),
    ("noise_refiner", re.compile(r"noise_refiner\.(\d+)\.")),
    ("context_refiner", re.compile(r"context_refiner\.(\d+)\.")),
    ("block", re.compile(r"(?:transformer_blocks|blocks|layers)\.(\d+)\.")),
)
_TEXT_LAYER = re.compile(r"(?:layers|resblocks|block)\.(\d+)\.")
TEXT_PLACES = ("te1", "te2", "te3")
PLACES = (*(name for name, _ in _PLACES), "other", "te", *TEXT_PLACES)
_RULE = re.compile(r"(?P<place>[a-z][a-z_0-9]*)(?:\.(?P<numbers>[\d+-]+))?(?:/(?P<kind>[a-z_]+))?[=:](?P<factor>[^=:]+)")

#: Name -> text. The names start with the families that they are made for.
PRESETS = {
    "any: no text encoder": "te=0",
    "any: text encoder only": "all=0, te=1",
    "any: attention only": "all=0, attention=1",
    "any: feed-forward only": "all=0, ff=1",
    "SD, SDXL: input only": "all=0, input=1",
    "SD, SDXL: middle only": "all=0, middle=1",
    "SD, SDXL: output only": "all=0, output=1",
    "SD, SDXL: cross-attention only": "all=0, cross=1",
    "SD, SDXL: no convolutions": "conv=0",
    # SD1 and SD2 halve the picture's grid after input blocks 2, 5 and 8; outputs 0-5 work on the two smallest.
    "SD1, SD2: coarse (layout)": "all=0, input.7-11=1, middle=1, output.0-5=1",
    "SD1, SD2: fine (texture)": "all=0, input.0-6=1, output.6-11=1, other=1",
    # B-LoRA (Frenkel et al. 2024, arXiv 2403.14572) and InstantStyle (Wang et al. 2024, arXiv 2404.02733).
    "SDXL: content (B-LoRA)": "all=0, output.0=1",
    "SDXL: style (B-LoRA)": "all=0, output.1=1",
    "SDXL: layout (InstantStyle)": "all=0, input.8=1",
    "Flux: double blocks only": "all=0, double=1",
    "Flux: single blocks only": "all=0, single=1",
    "SD3: attention of the first 12 blocks": "all=0, joint.0-11/attention=1",
}


@dataclass(frozen=True)
class Address:
    """Where a layer is. place: one of `PLACES` but ``te``.   number: of the block, None outside of blocks.   kinds: of `KINDS`."""

    place: str
    number: int | None
    kinds: frozenset[str]


@dataclass(frozen=True)
class Rule:
    """One ``selector=factor``. place None: any.   numbers None: all.   kind None: any."""

    place: str | None
    numbers: tuple[tuple[int, int], ...] | None
    kind: str | None
    factor: float

    def matches(self, address: Address) -> bool:
        any_text = self.place == "te" and address.place in TEXT_PLACES
        if self.place is not None and self.place != address.place and not any_text:
            return False
        if self.numbers is not None and (
            address.number is None or not any(low <= address.number <= high for low, high in self.numbers)
        ):
            return False
        return self.kind is None or self.kind in address.kinds

    def outside(self, known: Iterable[Address]) -> bool:
        """Whether the first or last number of a range is beyond every block of this place that there is."""
        if self.numbers is None:
            return False
        places = TEXT_PLACES if self.place == "te" else (self.place,)
        there = [a.number for a in known if a.place in places and a.number is not None]
        return not there or any(low < min(there) or high > max(there) for low, high in self.numbers)

    @property
    def selector(self) -> str:
        if self.place is None and self.kind is None:
            return "all"
        numbers = "" if self.numbers is None else "." + "+".join(
            f"{low}" if low == high else f"{low}-{high}" for low, high in self.numbers
        )
        parts = [self.place + numbers] if self.place else []
        return "/".join([*parts, self.kind] if self.kind else parts)

    def __str__(self) -> str:
        return f"{self.selector}={self.factor:.15g}"


@dataclass(frozen=True)
class BlockWeights:
    """A strength factor for every layer; ``str`` gives the text again, ``parse`` reads it."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, text: str) -> BlockWeights:
        """Rules separated by commas, semicolons, blanks or line ends; full-width signs and typographic dashes are read as plain ones.

        Raises BlockError for names that do not exist (listing those that do), and for what is no rule or no finite number.
        """
        plain = unicodedata.normalize("NFKC", text).lower()
        plain = re.sub(r"[\u2010-\u2015\u2212]", "-", plain).replace("\u3001", ",")
        plain = re.sub(r"\s*([=:/])\s*", r"\1", plain)
        return cls(tuple(_rule(part) for part in re.split(r"[\s,;]+", plain) if part))

    def __str__(self) -> str:
        return ", ".join(map(str, self.rules))

    def __add__(self, other: BlockWeights) -> BlockWeights:
        """Both texts, the other's rules last."""
        return BlockWeights(self.rules + other.rules)

    def factor(self, address: Address) -> float:
        return next((rule.factor for rule in reversed(self.rules) if rule.matches(address)), 1.0)

    def idle(self, addresses: Iterable[Address]) -> list[str]:
        """Selectors that match none of these addresses."""
        found = set(addresses)
        return [rule.selector for rule in self.rules if not any(map(rule.matches, found))]

    def check(self, addresses: Iterable[Address], *, model: bool = True, text: bool = True) -> None:
        """Raises BlockError for rules that match nothing in a model with these addresses, listing what it has.

        model, text: whether the addresses are of a diffusion model, of text encoders; rules for an absent side are let pass.
        """
        known = set(addresses)
        for rule in self.rules:
            for_text = rule.place == "te" or rule.place in TEXT_PLACES
            if rule.place is not None and not (text if for_text else model):
                continue
            if rule.selector != "all" and (not any(map(rule.matches, known)) or rule.outside(known)):
                raise BlockError(
                    "This model has no such block", found=rule.selector, expected=f"one of: {', '.join(described(known))}",
                )


def _rule(part: str) -> Rule:
    match = _RULE.fullmatch(part)
    if match is None:
        raise BlockError(
            "A block strength cannot be read", found=part, expected="name=number, for instance output.3-5/attention=0.5"
        )
    place, numbers, kind, factor = match["place"], match["numbers"], match["kind"], match["factor"]
    if place in KINDS and kind is None and numbers is None:
        place, kind = None, place
    elif place == "all" and numbers is None:
        place = None
    elif place not in PLACES or (numbers is not None and place == "other"):
        raise _unknown(place if numbers is None or place not in PLACES else f"{place}.{numbers}")
    if kind is not None and kind not in KINDS:
        raise _unknown(kind)
    try:
        value = float(factor)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BlockError("A block strength is not a finite number", found=part, expected=f"{part.split('=')[0]}=0.5")
    return Rule(place, None if numbers is None else _ranges(numbers, part), kind, value)


def _ranges(text: str, part: str) -> tuple[tuple[int, int], ...]:
    """``3``, ``3-5`` and ``1+4-6`` as (first, last) pairs."""
    out = []
    for piece in text.split("+"):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise BlockError("Block numbers cannot be read", found=part, expected="for instance output.3, output.3-5, output.1+4-6")
        out.append((int(match[1]), int(match[2] or match[1])))
    return tuple(out)


def _unknown(name: str) -> BlockError:
    return BlockError("Unknown block name", found=name, expected=f"one of: all, {', '.join((*PLACES, *KINDS))}")


def described(addresses: Iterable[Address]) -> list[str]:
    """The names that these addresses go by, with the numbers of their blocks."""
    numbers: dict[str, set[int]] = {}
    kinds: set[str] = set()
    for address in addresses:
        found = numbers.setdefault(address.place, set())
        if address.number is not None:
            found.add(address.number)
        kinds |= address.kinds
    names = [f"{p}.{_spans(numbers[p])}" if numbers[p] else p for p in PLACES if p in numbers]
    return [*names, *(kind for kind in KINDS if kind in kinds)]


def _spans(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> ``0-2+5``"""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "+".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def address(index: NameIndex, key: str, rows: tuple[int, int] | None = None) -> Address | None:
    """Where the parameter (or these rows of it: start, length) is; None if it belongs to no part of a model.

    The layer's own path and its names in the other layout are looked at, so a diffusers model answers to the same names.
    """
    weight = key[: -len("bias")] + "weight" if key.endswith(".bias") else key
    spelling = index.spelling(weight)
    if spelling is None:
        return None
    names = [spelling.path, *(name for name, _, _ in spelling.others)]
    shape = index.shapes[weight]
    kinds = {kind for kind, pattern in _KINDS.items() if any(map(pattern.search, names))}
    if spelling.part != "unet":
        layer = _first((name, _TEXT_LAYER) for name in names)
        return Address(spelling.part, layer, frozenset(kinds - {"projection"}))
    if len(shape) > 2 and weight.endswith(".weight") and "projection" not in kinds:
        kinds.add("conv")
    fused = rows is not None and any(name.endswith(".linear1") for name in names)
    if fused and rows[0] >= 3 * shape[1]:  # Flux' single blocks: query, key, value, then the MLP
        kinds.discard("attention")
    elif fused and sum(rows) <= 3 * shape[1]:
        kinds.discard("ff")
    for place, pattern in _PLACES:
        number = _first((name, pattern) for name in names)
        if number is not None:
            # The second attention of SD3.5's joint blocks looks at the picture itself.
            return Address(place, number, frozenset(kinds - {"cross"} if place == "joint" else kinds))
    return Address("other", None, frozenset(kinds))


def factors(
    weights: BlockWeights, index: NameIndex, places: Sequence[tuple[str, tuple[int, int] | None]], *, parts: Iterable[str] | None = None
) -> list[float]:
    """The factor of each parameter (key, rows) of a model, in order.

    parts: "unet" and "te" as far as the model that ``index`` knows has them, None: what is found. Raises BlockError for rules that
    match nothing in the whole model, whatever the adapter has.
    """
    known = {found for key in index.shapes if (found := address(index, key)) is not None}
    if parts is None:
        parts = {"te" if found.place in TEXT_PLACES else "unet" for found in known}
    weights.check(known, model="unet" in parts, text="te" in parts)
    found = (address(index, key, rows) for key, rows in places)
    return [1.0 if one is None else weights.factor(one) for one in found]


def _first(tries: Iterable[tuple[str, re.Pattern[str]]]) -> int | None:
    for name, pattern in tries:
        match = pattern.match(name) if pattern is not _TEXT_LAYER else pattern.search(name)
        if match is not None:
            return int(match[1])
    return None


def counted(values: Iterable[float]) -> str:
    """``12 weights ×0.5, 58 ×1``: how many have which factor, most first."""
    parts = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{n} \N{MULTIPLICATION SIGN}{factor:g}" for factor, n in parts)
    return text.replace(" ", " weights ", 1)
