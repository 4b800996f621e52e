"""Applying a file to ComfyUI's MODEL and CLIP: its layers are found (`host_names`), each becomes a weight patch
(`host_patch`) or turned activations (`runtime`), and the report says what happened.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.patcher_extension

from ..oft_core import (
    Adapter,
    AdapterError,
    Binding,
    ModelMismatch,
    Patch,
    Schedule,
    ShapeError,
    Strength,
    Target,
    component,
    describe,
    guess_family,
)
from ..oft_core.block_weights import address, counted, factors
from . import runtime, track
from .cache import normal_tensors
from .host_names import HostIndex, Side, names_of, sides_of
from .host_patch import Keeper, make_patches, patch_objects
from .turned import Entry

log = logging.getLogger("oft")


@dataclass(frozen=True)
class Applied:
    """What a node gives on: the patched (or same) model and text encoders, and the report as text."""

    model: Any
    clip: Any
    report: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Placed:
    """An adapter's patches on a model, before anything is patched: side name -> (patch, its strength)."""

    patches: dict[str, list[tuple[Patch, Strength]]]
    report: str
    warnings: tuple[str, ...]


def place(
    adapter: Adapter, sides: list[Side], at_model: Strength, at_clip: Strength, also: Iterable[float] = ()
) -> Placed:
    """Find the adapter's layers on the sides and check the strengths; nothing is patched.

    also: factors that the strengths will have later, beside 1 and those of the adapter's schedule. Raises
    `ModelMismatch` if no layer of the file belongs to the given models, and `StrengthError` if mode or
    strengths are not defined for the file.
    """
    given = {side.name for side in sides}
    absent = _absent(adapter, given)
    binding, index = _bound(adapter, *names_of(sides), absent)
    shares, about_blocks = _shares(adapter, binding, index, given)

    patches: dict[str, list[tuple[Patch, Strength]]] = {side.name: [] for side in sides}
    notes: list[str] = []
    for side in sides:
        at = at_model if side.name == "model" else at_clip
        mine = [p for p in binding.patches if _side_of(p, sides) is side]
        if not mine:
            continue
        patches[side.name] = _weighted(mine, at, shares)
        if at.value == 0:
            notes.append(f"{side.words}: strength 0, nothing changed.")
            continue
        later = set(also)
        if adapter.schedule is not None and side.name == "model":
            later |= {factor for _, factor in adapter.schedule.sampled()}
        with normal_tensors():
            for patch, its in patches[side.name]:
                for factor in (1.0, *sorted(later - {0.0, 1.0})):
                    its_then = replace(its, value=its.value * factor)
                    patch.op.check_strength(its_then, module=patch.module, file=adapter.path)
        if side.name == "clip" and "model" in given and at != at_model:
            notes.append(f"Text encoders: strength {at.value:g}.")

    unmatched = {m: why for m, why in binding.unmatched.items() if adapter.entries[m].component not in absent}
    with normal_tensors():
        at = at_model if "model" in given else at_clip
        report = describe(adapter, replace(binding, unmatched=unmatched), at)
    left_out = {c: sum(adapter.entries[m].component == c for m in binding.unmatched) for c in sorted(absent)}
    notes += [f"{count} layers for {absent[c]} not used." for c, count in left_out.items() if count]
    notes += about_blocks
    if adapter.schedule is not None:
        notes.append(_about_schedule(adapter.schedule, any(patches.get("clip", ()))))
    for warning in report.warnings:
        log.warning("OFT %s: %s", adapter.name, warning)
    return Placed(patches, "\n".join([report.to_text(), *notes]), tuple(report.warnings))


def apply(
    adapter: Adapter,
    model: Any | None,
    clip: Any | None,
    at_model: Strength,
    at_clip: Strength,
    how: str = runtime.AUTO,
) -> Applied:
    """Patch clones of `model` and `clip` with the file, each at its own strength.

    model, clip: ComfyUI's MODEL and CLIP, either may be None. At strength 0 a side is handed on as it came,
    without patches. how: one of `runtime.RUNTIMES`. Raises what `place` and `runtime.plan` raise.
    """
    sides = sides_of(model, clip)
    placed = place(adapter, sides, at_model, at_clip)
    given = {"model": model, "clip": clip}
    notes: list[str] = []
    for side in sides:
        mine = placed.patches[side.name]
        notes += runtime_notes(side, mine, how)
        given[side.name] = patched(side, mine, how, adapter.schedule)
    return Applied(given["model"], given["clip"], "\n".join([placed.report, *notes]), placed.warnings)


def runtime_notes(side: Side, placed: Iterable[tuple[Patch, Strength]], how: str = runtime.AUTO) -> list[str]:
    """Lines for the report on what `patched` does with weights and what with activations."""
    return list(runtime.plan(side.patcher.model, placed, how, side.words).notes)


def _shares(
    adapter: Adapter, binding: Binding, index: HostIndex, given: set[str]
) -> tuple[dict[int, float], list[str]]:
    """Factors by the adapter's block strengths (id of patch -> factor of its strength), and lines about it.

    Raises `BlockError` for blocks that this model does not have.
    """
    if adapter.blocks is None:
        return {}, []
    places = [(patch.key, patch.rows) for patch in binding.patches]
    parts = {"unet" if name == "model" else "te" for name in given}
    share = factors(adapter.blocks, index, places, parts=parts)
    notes = [f"Strength by block ({adapter.blocks}): {counted(share)}."]
    idle = adapter.blocks.idle(at for place in places if (at := address(index, *place)) is not None)
    if idle:
        notes.append(f"The file has no layer in: {', '.join(idle)}.")
    return dict(zip(map(id, binding.patches), share, strict=True)), notes


def _about_schedule(schedule: Schedule, has_text: bool) -> str:
    whole = (schedule.start, schedule.end) == (0, 1)
    window = "" if whole else f" from {schedule.start:g} to {schedule.end:g}"
    text = f"Strength follows a schedule{window}: {schedule}."
    return text + (" The text encoders keep theirs: they run before sampling." if has_text else "")


def _weighted(
    patches: Iterable[Patch], at: Strength, shares: Mapping[int, float]
) -> list[tuple[Patch, Strength]]:
    """Each patch with its strength: the slider times its block's factor."""
    return [(patch, replace(at, value=at.value * shares.get(id(patch), 1.0))) for patch in patches]


def _side_of(patch: Patch, sides: list[Side]) -> Side:
    return next(side for side in sides if patch.key in side.shapes)


def patched(
    side: Side,
    placed: Iterable[tuple[Patch, Strength]],
    how: str = runtime.AUTO,
    schedule: Schedule | None = None,
) -> Any:
    """A clone of the side's MODEL or CLIP with the patches added, each at its strength.

    Patches at strength 0 are left out; where none remains the side is handed on as it came. how: one of
    `runtime.RUNTIMES`; layers whose activations are turned get no weight patch. schedule: what the strength
    of the diffusion model follows while sampling; text encoders keep theirs.
    """
    plan = runtime.plan(side.patcher.model, placed, how, side.words)
    if not plan.weights and not plan.live:
        return side.owner
    clone = side.owner.clone()
    patcher = clone.patcher if side.name == "clip" else clone
    follow = track.Track(schedule) if schedule is not None and side.name == "model" else None
    tokens: set[int] = set()
    for at, patches in _by_strength(plan.weights).items():
        dictionaries, keeper = make_patches(side, patches, at.mode, at.coft, follow)
        tokens |= {batch.token for batch in keeper.batches}
        for patch_dict in dictionaries:
            taken = set(clone.add_patches(patch_dict, at.value))
            refused = [key for key in patch_dict if key not in taken]
            if refused:
                # The keys come from this very model, so a pack must have replaced its patcher.
                raise AdapterError(
                    "The model did not accept all patches",
                    found=f"{len(refused)} refused, for instance {refused[0]}",
                    hint="Another custom node may have replaced the model's patching; try without it.",
                )
        patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_LOAD, keeper)
    entries, keepers = [], []
    for at, patches in _by_strength(plan.live).items():
        objects, keeper = patch_objects(side, patches, at.mode, at.coft, follow)
        entries += [Entry(patch, at, made, follow) for patch, made in objects]
        keepers.append(keeper)
    if entries:
        runtime.attach(patcher, runtime.Application(entries, patcher, keepers))
    if follow is not None:
        keys = {patch.key for patch, _ in [*plan.weights, *plan.live]}
        track.attach(patcher, follow, keys, tokens)
        runtime.watch_merging(patcher)
    return clone


def add_hook_patches(hook: Any, side: Side, placed: Iterable[tuple[Patch, Strength]]) -> list[Keeper]:
    """Give a hook its patches for a side; returns what must live as long as they do.

    Quantised layers, whose weights ComfyUI's hooks cannot change or would round again, have their activations turned
    while the hook is in force. Raises what `runtime.plan_for_hook` raises.
    """
    plan = runtime.plan_for_hook(side.patcher, placed, side.words)
    keepers = []
    for at, patches in _by_strength(plan.weights).items():
        dictionaries, keeper = make_patches(side, patches, at.mode, at.coft)
        for patch_dict in dictionaries:
            side.patcher.add_hook_patches(hook=hook, patches=patch_dict, strength_patch=at.value)
        keepers.append(keeper)
    factor, entries = runtime.HookFactor(hook.hook_ref, side.patcher.model), []
    for at, patches in _by_strength(plan.live).items():
        objects, keeper = patch_objects(side, patches, at.mode, at.coft)
        entries += [Entry(patch, at, made, factor) for patch, made in objects]
        keepers.append(keeper)
    if entries:
        log.info("OFT: a hook turns activations of %d layers while it is in force.", len({e.patch.key for e in entries}))
        application = runtime.HookApplication(entries, side.patcher, keepers, hook.hook_ref)
        runtime.hang_on(side.patcher, application, stays=side.name == "clip")
    return keepers


def _by_strength(placed: Iterable[tuple[Patch, Strength]]) -> dict[Strength, list[Patch]]:
    groups: dict[Strength, list[Patch]] = {}
    for patch, at in placed:
        groups.setdefault(at, []).append(patch)
    return groups


def _absent(adapter: Adapter, given: set[str]) -> dict[str, str]:
    """Components that the file has and the node was not given, with words for them. given: side names."""
    words = {
        c: "the text encoder (no CLIP given)" if c != "unet" else "the diffusion model (no MODEL given)"
        for c in map(component, adapter.entries)
    }
    return {
        c: w for c, w in words.items() if ("model" if c == "unet" else "clip") not in given
    }


FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
    "sd3": "Stable Diffusion 3 or 3.5",
    "flux": "Flux",
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


# The last bindings: their layers keep spectra, which make the next strength or mode of the same file cheap.
_bindings: OrderedDict[tuple[int, int], tuple[Adapter, Binding, HostIndex]] = OrderedDict()
_bindings_lock = threading.Lock()
KEPT_BINDINGS = 8


def _bound(
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, Target],
    absent: Mapping[str, str],
) -> tuple[Binding, HostIndex]:
    """The file's layers placed on the model. Raises `ModelMismatch` if the file is for something else."""
    # The layers, not the adapter: another text of block strengths makes another adapter with the same layers.
    key = (id(adapter.entries), hash(tuple(shapes.items())))
    with _bindings_lock:
        if key in _bindings:
            _bindings.move_to_end(key)
            return _bindings[key][1:]
    index = HostIndex(shapes, aliases)
    with normal_tensors():
        binding = _place(adapter, index, absent)
    with _bindings_lock:
        _bindings[key] = (adapter, binding, index)  # the adapter too, so that the id stays its layers' own
        while len(_bindings) > KEPT_BINDINGS:
            _bindings.popitem(last=False)
    return binding, index


def _place(adapter: Adapter, index: HostIndex, absent: Mapping[str, str]) -> Binding:
    made_for, is_a = guess_family(adapter.entries), index.family
    if set(adapter.components) <= set(absent):
        raise ModelMismatch(
            "This file has layers only for a part that the node was not given",
            file=adapter.path,
            found=", ".join(sorted(set(absent.values()))),
            hint="Use Load OFT with both MODEL and CLIP connected.",
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
