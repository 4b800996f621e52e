"""Applying a file to ComfyUI's MODEL and CLIP, in one direction:

`place` finds its layers and says what happened, `plan` decides which way each goes, `patched` gives a clone of the model
their weight patches (`patch`) or turned activations (`runtime`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension

from ...oft_core import Adapter, AdapterError, Patch, Schedule, Strength
from ...oft_core import place as placing
from ...oft_core.place import Placed, Words
from . import runtime, track
from .names import HostIndex, Side, names_of, sides_of
from .patch import Keeper, make_patches, patch_objects
from .plan import AUTO, Plan, plan, plan_for_hook
from .turned import Entry

log = logging.getLogger("oft")

WORDS = Words(
    model="the diffusion model (no MODEL given)",
    text="the text encoder (no CLIP given)",
    alone="This file has layers only for a part that the node was not given",
    hint="Use Load OFT with both MODEL and CLIP connected.",
)


@dataclass(frozen=True)
class Applied:
    """What a node gives on: the patched (or same) model and text encoders, and the report as text."""

    model: Any
    clip: Any
    report: str
    warnings: tuple[str, ...]


def place(
    adapter: Adapter, sides: list[Side], at_model: Strength, at_clip: Strength, also: Iterable[float] = ()
) -> Placed:
    """`oft_core.place` with ComfyUI's own key tables beside our names, in the words of its nodes. Raises what that raises."""
    _, aliases = names_of(sides)
    at = {"model": at_model, "clip": at_clip}
    return placing.place(adapter, sides, at, also, index=lambda shapes: HostIndex(shapes, aliases), words=WORDS)


def apply(
    adapter: Adapter,
    model: Any | None,
    clip: Any | None,
    at_model: Strength,
    at_clip: Strength,
    how: str = AUTO,
) -> Applied:
    """Patch clones of `model` and `clip` with the file, each at its own strength.

    model, clip: ComfyUI's MODEL and CLIP, either may be None. At strength 0 a side is handed on as it came,
    without patches. how: one of `RUNTIMES`. Raises what `place` and `plan` raise.
    """
    sides = sides_of(model, clip)
    placed = place(adapter, sides, at_model, at_clip)
    given = {"model": model, "clip": clip}
    notes: list[str] = []
    for side in sides:
        ways = plan(side, placed.patches[side.name], how)
        notes += ways.notes
        given[side.name] = patched(side, ways, adapter.schedule)
    return Applied(given["model"], given["clip"], "\n".join([placed.report, *notes]), placed.warnings)


def patched(side: Side, ways: Plan, schedule: Schedule | None = None) -> Any:
    """A clone of the side's MODEL or CLIP with the patches added, each at its strength.

    ways: what `plan` gave for the side; without any patch the side is handed on as it came. schedule: what the
    strength of the diffusion model follows while sampling; text encoders keep theirs.
    """
    if not ways.weights and not ways.live:
        return side.owner
    clone = side.owner.clone()
    patcher = clone.patcher if side.name == "clip" else clone
    follow = track.Track(schedule) if schedule is not None and side.name == "model" else None
    tokens: set[int] = set()
    for at, patches in _by_strength(ways.weights).items():
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
    for at, patches in _by_strength(ways.live).items():
        objects, keeper = patch_objects(side, patches, at.mode, at.coft, follow)
        entries += [Entry(patch, at, made, follow) for patch, made in objects]
        keepers.append(keeper)
    if entries:
        runtime.attach(patcher, runtime.Application(entries, patcher, keepers))
    if follow is not None:
        keys = {patch.key for patch, _ in [*ways.weights, *ways.live]}
        track.attach(patcher, follow, keys, tokens)
        runtime.watch_merging(patcher)
    return clone


def patch_for_hook(hook: Any, side: Side, placed: Iterable[tuple[Patch, Strength]]) -> list[Keeper]:
    """Give a hook its patches for a side; returns what must live as long as they do.

    Quantised layers, whose weights ComfyUI's hooks cannot change or would round again, have their activations turned
    while the hook is in force. Raises what `plan_for_hook` raises.
    """
    ways = plan_for_hook(side, placed)
    keepers = []
    for at, patches in _by_strength(ways.weights).items():
        dictionaries, keeper = make_patches(side, patches, at.mode, at.coft)
        for patch_dict in dictionaries:
            side.patcher.add_hook_patches(hook=hook, patches=patch_dict, strength_patch=at.value)
        keepers.append(keeper)
    factor, entries = runtime.HookFactor(hook.hook_ref, side.patcher.model), []
    for at, patches in _by_strength(ways.live).items():
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
