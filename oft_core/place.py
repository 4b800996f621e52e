"""An adapter on a loaded model: which layers go where, how strongly, and the report. Nothing is changed here.

Hosts give the parts of a model that they hold (a diffusion model, text encoders) and turn what is placed into
patches of their own: file → `Adapter` → `find` → `place` → the host's weights or activations.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .adapter import Adapter, Binding, Patch
from .block_weights import address, counted, factors
from .constraint import Strength
from .errors import ModelMismatch, ShapeError
from .names import NameIndex, component, guess_family
from .report import describe
from .schedule import Schedule
from .tensors import normal_tensors

log = logging.getLogger("oft")

Shapes = Mapping[str, tuple[int, ...]]


class Part(Protocol):
    """One of the two things that a file can patch.

    name: "model" (the diffusion model) or "clip" (all text encoders together).   words: the same for people.
    shapes: parameter key -> shape.
    """

    @property
    def name(self) -> str: ...
    @property
    def words(self) -> str: ...
    @property
    def shapes(self) -> Shapes: ...


@dataclass(frozen=True)
class Words:
    """What a host says of parts that it was not given.

    model, text: the diffusion model, the text encoders.   alone, hint: where a file has layers for nothing else.
    """

    model: str = "the diffusion model (not given)"
    text: str = "the text encoder (not given)"
    alone: str = "This file has layers only for a part that was not given"
    hint: str | None = None


@dataclass(frozen=True)
class Placed:
    """An adapter's patches on a model, before anything is patched: part name -> (patch, its strength)."""

    patches: dict[str, list[tuple[Patch, Strength]]]
    report: str
    warnings: tuple[str, ...]


def place(
    adapter: Adapter,
    parts: Sequence[Part],
    at: Mapping[str, Strength],
    also: Iterable[float] = (),
    *,
    index: Callable[[Shapes], NameIndex] = NameIndex,
    words: Words = Words(),
) -> Placed:
    """Find the adapter's layers on the parts, give each its strength and check it; nothing is patched.

    at: part name -> strength.   also: factors that the strengths will have later, beside 1 and those of the
    adapter's schedule.   index: makes the host's index of names from all parameters' shapes.   words: the host's own.

    Raises `ModelMismatch` if no layer of the file belongs to the given parts, `BlockError` for block strengths of
    blocks that the model does not have, and `StrengthError` if mode or strengths are not defined for the file.
    """
    given = {part.name for part in parts}
    absent = _absent(adapter, given, words)
    # Where two parts share a name, it is the first one's.
    shapes = {key: shape for part in reversed(parts) for key, shape in part.shapes.items()}
    binding, names = find(adapter, shapes, index, absent, words)
    shares, about_blocks = _shares(adapter, binding, names, given)

    patches: dict[str, list[tuple[Patch, Strength]]] = {part.name: [] for part in parts}
    for patch in binding.patches:
        name = next(part.name for part in parts if patch.key in part.shapes)
        full = at[name]
        patches[name].append((patch, replace(full, value=full.value * shares.get(id(patch), 1.0))))

    notes: list[str] = []
    for part in parts:
        if not patches[part.name]:
            continue
        if at[part.name].value == 0:
            notes.append(f"{part.words}: strength 0, nothing changed.")
            continue
        later = set(also)
        if adapter.schedule is not None and part.name == "model":
            later |= {factor for _, factor in adapter.schedule.sampled()}
        _check_strengths(adapter, patches[part.name], later)
        if part.name == "clip" and "model" in given and at["clip"] != at["model"]:
            notes.append(f"Text encoders: strength {at['clip'].value:g}.")

    unmatched = {m: why for m, why in binding.unmatched.items() if adapter.entries[m].component not in absent}
    with normal_tensors():
        report = describe(adapter, replace(binding, unmatched=unmatched), at["model" if "model" in given else "clip"])
    left_out = {c: sum(adapter.entries[m].component == c for m in binding.unmatched) for c in sorted(absent)}
    notes += [f"{count} layers for {absent[c]} not used." for c, count in left_out.items() if count]
    notes += about_blocks
    if adapter.schedule is not None:
        notes.append(_about_schedule(adapter.schedule, any(patches.get("clip", ()))))
    for warning in report.warnings:
        log.warning("OFT %s: %s", adapter.name, warning)
    return Placed(patches, "\n".join([report.to_text(), *notes]), tuple(report.warnings))


def _check_strengths(adapter: Adapter, placed: Iterable[tuple[Patch, Strength]], later: set[float]) -> None:
    with normal_tensors():
        for patch, at in placed:
            for factor in (1.0, *sorted(later - {0.0, 1.0})):
                then = replace(at, value=at.value * factor)
                patch.op.check_strength(then, module=patch.module, file=adapter.path)


def _shares(
    adapter: Adapter, binding: Binding, index: NameIndex, given: set[str]
) -> tuple[dict[int, float], list[str]]:
    """Factors by the adapter's block strengths (id of patch -> factor of its strength), and lines about it."""
    if adapter.blocks is None:
        return {}, []
    places = [(patch.key, patch.rows) for patch in binding.patches]
    share = factors(adapter.blocks, index, places, parts={"unet" if name == "model" else "te" for name in given})
    notes = [f"Strength by block ({adapter.blocks}): {counted(share)}."]
    idle = adapter.blocks.idle(where for place in places if (where := address(index, *place)) is not None)
    if idle:
        notes.append(f"The file has no layer in: {', '.join(idle)}.")
    return dict(zip(map(id, binding.patches), share, strict=True)), notes


def _about_schedule(schedule: Schedule, has_text: bool) -> str:
    whole = (schedule.start, schedule.end) == (0, 1)
    window = "" if whole else f" from {schedule.start:g} to {schedule.end:g}"
    text = f"Strength follows a schedule{window}: {schedule}."
    return text + (" The text encoders keep theirs: they run before sampling." if has_text else "")


def _absent(adapter: Adapter, given: set[str], words: Words) -> dict[str, str]:
    """Components that the file has and that are not given, with words for them."""
    parts = {c: "model" if c == "unet" else "clip" for c in map(component, adapter.entries)}
    return {c: words.model if p == "model" else words.text for c, p in parts.items() if p not in given}


# --- layers -------------------------------------------------------------------------------------------------

# The last bindings: their layers keep spectra, which make the next strength or mode of the same file cheap.
_bindings: OrderedDict[tuple[int, int], tuple[Adapter, Binding, NameIndex]] = OrderedDict()
_bindings_lock = threading.Lock()
KEPT_BINDINGS = 8


def find(
    adapter: Adapter,
    shapes: Shapes,
    index: Callable[[Shapes], NameIndex] = NameIndex,
    absent: Mapping[str, str] | None = None,
    words: Words = Words(),
) -> tuple[Binding, NameIndex]:
    """The file's layers on a model's parameters, kept for the next strength, and the index of its names.

    absent: components that the model is not expected to have, with words for them; words: for all of them. Raises `ModelMismatch` if the
    file is for something else.
    """
    # The layers, not the adapter: another text of block strengths makes another adapter with the same layers.
    key = (id(adapter.entries), hash(tuple(shapes.items())))
    with _bindings_lock:
        if key in _bindings:
            _bindings.move_to_end(key)
            return _bindings[key][1:]
    names = index(shapes)
    with normal_tensors():
        binding = _bound(adapter, names, absent or {}, words)
    with _bindings_lock:
        _bindings[key] = (adapter, binding, names)  # the adapter too, so that the id stays its layers' own
        while len(_bindings) > KEPT_BINDINGS:
            _bindings.popitem(last=False)
    return binding, names


FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3 or 3.5",
    "flux": "Flux",
    "flux2": "Flux.2",
    "chroma": "Chroma",
    "svd": "Stable Video Diffusion",
    "hunyuan_video": "HunyuanVideo or HunyuanImage",
    "hunyuan_dit": "HunyuanDiT",
    "hunyuan3d": "Hunyuan3D",
    "ltx": "LTX-Video",
    "qwen_image": "Qwen-Image",
    "auraflow": "AuraFlow",
    "lumina2": "Lumina 2 or Z-Image",
    "omnigen2": "OmniGen2",
    "pixart": "PixArt",
    "wan": "Wan",
    "hidream": "HiDream",
    "cosmos": "Cosmos",
    "mochi": "Mochi",
    "cascade": "Stable Cascade",
    "ace_step": "ACE-Step",
    "stable_audio": "Stable Audio",
    "unet": "a Stable Diffusion U-Net",
    "text encoder": "a text encoder",
    "unknown": "a model of unknown kind",
}
DEFINITE = frozenset({"sd1", "sd2", "sdxl", "sd3", "flux"})


def _kinds(family: str) -> list[str]:
    """The families in one of `guess_family`'s answers, such as "sd1, sd2 or sdxl"."""
    return re.split(", | or ", family)


def _called(family: str) -> str:
    return " or ".join(FAMILIES.get(kind, kind) for kind in _kinds(family))


def _bound(adapter: Adapter, index: NameIndex, absent: Mapping[str, str], words: Words) -> Binding:
    made_for, is_a = guess_family(adapter.entries), index.family
    if set(adapter.components) <= set(absent):
        raise ModelMismatch(
            words.alone,
            file=adapter.path,
            found=", ".join(sorted(set(absent.values()))),
            hint=words.hint,
        )
    hint = "Choose a file that was trained on this kind of model."
    try:
        binding = adapter.bind(index, strict=False)
    except ShapeError as error:
        if is_a in _kinds(made_for) or not {is_a, *_kinds(made_for)} <= DEFINITE:
            raise
        # Some names are the same in several families; the sizes then are not.
        found = f"a file for {_called(made_for)}; its layer {error.module} does not fit ({error.found})"
        raise ModelMismatch(
            "This file is for another kind of model",
            file=adapter.path,
            found=found,
            expected=f"a file for {_called(is_a)}",
            hint=hint,
        ) from error
    if not binding.matched:
        raise ModelMismatch(
            "No layer of this file belongs to this model",
            file=adapter.path,
            module=next(iter(adapter.entries)),
            found=f"a file for {_called(made_for)}, {len(adapter.entries)} layers",
            expected=f"a file for {_called(is_a)}",
            hint=hint,
        )
    return binding
