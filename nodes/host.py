"""What touches ComfyUI's weight patching: names of the model's weights, the patch object, adding patches.
`runtime.py` has the other way, turned activations.

An OFT patch is a multiplication, so it cannot be handed over as an additive difference. It goes into
`ModelPatcher.patches` as a weight adapter object that rotates the weight in place when ComfyUI asks for it:
on a full load, on every forward of a partly loaded model, for hooks, and when a checkpoint is saved.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch
from comfy.weight_adapter.base import WeightAdapterBase

from ..oft_core import (
    Adapter,
    AdapterError,
    Binding,
    Diff,
    LayerRotation,
    ModelMismatch,
    NameIndex,
    Patch,
    Schedule,
    ShapeError,
    Strength,
    Target,
    component,
    describe,
    guess_family,
)
from ..oft_core.adapter import apply_swapped_
from ..oft_core.block_weights import address, counted, factors
from . import cache, layers, runtime, track

log = logging.getLogger("oft")

# What a patch holds: a rotation, or an additive difference (norms and biases of some files).
ROTATION, DIFF = "rotation", "diff"


@contextlib.contextmanager
def normal_tensors():
    """Make ordinary tensors although nodes run under inference mode: these outlive the node."""
    with torch.inference_mode(False), torch.no_grad():
        yield


# --- names --------------------------------------------------------------------------------------------------


class HostIndex(NameIndex):
    """`NameIndex` over a loaded model, then ComfyUI's own LoRA key tables for families it does not know."""

    def __init__(self, shapes: Mapping[str, Any], aliases: Mapping[str, Target]):
        super().__init__(shapes)
        self._aliases = aliases

    def resolve(self, module: str, clip: str = "te1") -> list[Target]:
        found = super().resolve(module, clip)
        if found:
            return found
        target = self._aliases.get(_plain(module))
        return [target] if target is not None else []


def _plain(name: str) -> str:
    """One spelling for dotted and underscored names, and for kohya's OFT prefix."""
    name = name.replace(".", "_")
    return "lora_unet_" + name[len("oft_unet_") :] if name.startswith("oft_unet_") else name


def _aliases(table: Mapping[str, Any]) -> dict[str, Target]:
    """ComfyUI's key table as targets: name -> key, (key, (dim, start, length)) or (key, slice, function)."""
    out: dict[str, Target] = {}
    for name, to in table.items():
        key, piece, function = (*to, None, None)[:3] if isinstance(to, tuple) else (to, None, None)
        if piece is not None and piece[0] != 0:
            continue
        if function is not None and function is not comfy.utils.swap_scale_shift:
            continue
        rows = None if piece is None else (int(piece[1]), int(piece[2]))
        out.setdefault(_plain(name), Target(key=key, rows=rows, swap_halves=function is not None))
    return out


def _shapes(patcher: Any) -> dict[str, tuple[int, ...]]:
    """Parameter key -> shape, as the layers mean it where they hold packed bytes."""
    shapes = {}
    for key, value in layers.tensors_of(patcher.model, patcher.model_state_dict()):
        shape = tuple(value.shape)
        # Numbers of one byte too: blocks with common scales are padded to whole blocks.
        packed = key.endswith(".weight") and (value.dtype.itemsize == 1 or not value.is_floating_point())
        shapes[key] = layers.logical_shape(patcher.model, key, shape) if packed else shape
    return shapes


@dataclass(frozen=True)
class Side:
    """One of the two things that a file can patch: the diffusion model or the text encoders."""

    name: str
    words: str
    owner: Any
    patcher: Any
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, Target]


def model_side(model: Any) -> Side:
    """The diffusion model of a MODEL."""
    return Side(
        "model",
        "Diffusion model",
        model,
        model,
        _shapes(model),
        _aliases(comfy.lora.model_lora_keys_unet(model.model, {})),
    )


def _clip_side(clip: Any) -> Side:
    table = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    return Side("clip", "Text encoders", clip, clip.patcher, _shapes(clip.patcher), _aliases(table))


def text_side(patcher: Any) -> Side:
    """Text encoders known by their patcher alone, as hooks are given them."""
    aliases = _aliases(comfy.lora.model_lora_keys_clip(patcher.model, {}))
    return Side("clip", "Text encoders", patcher, patcher, _shapes(patcher), aliases)


def bare_side(model: Any) -> Side:
    """The side of a diffusion or text encoder module without its patcher; a loaded one's patcher is looked up."""
    loaded = (entry.model for entry in comfy.model_management.current_loaded_models)
    cpu = torch.device("cpu")
    patcher = next((p for p in loaded if p is not None and p.model is model), None)
    patcher = patcher or comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    return model_side(patcher) if isinstance(model, comfy.model_base.BaseModel) else text_side(patcher)


def sides_of(model: Any | None, clip: Any | None) -> list[Side]:
    """What there is to patch, the diffusion model first; either may be None."""
    sides = [model_side(model)] if model is not None else []
    return sides if clip is None else [*sides, _clip_side(clip)]


def _names(sides: list[Side]) -> tuple[dict[str, tuple[int, ...]], dict[str, Target]]:
    """All parameters and all of ComfyUI's names; where two sides share a name, it is the first one's."""
    shapes = {key: shape for side in reversed(sides) for key, shape in side.shapes.items()}
    aliases = {name: target for side in reversed(sides) for name, target in side.aliases.items()}
    return shapes, aliases


def index_of(model: Any | None, clip: Any | None) -> HostIndex:
    """The names of a MODEL's and a CLIP's weights together; either may be None."""
    return HostIndex(*_names(sides_of(model, clip)))


def own_weights(model: Any | None, clip: Any | None) -> Callable[[str], torch.Tensor]:
    """Parameter key -> the model's own value of it, float32, without the patches that ComfyUI has merged into it.

    Asking raises ShapeError for a weight that its layer hides.
    """
    sides = sides_of(model, clip)

    def get(key: str) -> torch.Tensor:
        side = next(side for side in sides if key in side.shapes)
        value = layers.plain_weight(side.patcher, key)
        if value is None:
            raise ShapeError(
                "The model's own weight is stored in a form that cannot be read", module=key,
                hint="Use a model file that is not quantised.",
            )
        return value

    return get


# --- the patch object ---------------------------------------------------------------------------------------


class RotationPatch(WeightAdapterBase):
    """One layer's change, as ComfyUI's weight adapter.

    ComfyUI may rebuild the object as `type(x)(x.loaded_keys, moved_weights)`, so everything is in `weights`:
    (tensors, meta, plan) with plan = (kind, batch token, place in the batch, mode, coft, swap_halves). The
    tensors are the layer's own generator and scales; the token only finds rotations that were already built.
    """

    name = "oft_rotation"

    def __init__(self, loaded_keys: Iterable[str], weights: tuple):
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
        **_,
    ):
        """Rotate `weight` in place by `strength` and return it.

        With an offset ComfyUI hands over a view and drops what is returned, hence in place.
        `intermediate_dtype` is not used: a rotation built in half precision is not orthogonal.
        `original_weight` is a tensor or a dict, depending on the caller, and is not needed.
        """
        if strength == 0:
            return weight
        if function is not None and getattr(function, "__module__", None) != comfy.lora.__name__:
            # Chunk swaps of ComfyUI's key tables, their own inverse. Rotating the rows in the file's order
            # and swapping back is right for both sides; swapping the difference alone would not be.
            rows = function(weight).contiguous()
            self._apply(rows, float(strength))
            return weight.copy_(function(rows))
        self._apply(weight, float(strength))
        return weight

    def _apply(self, weight: torch.Tensor, strength: float) -> None:
        (tensors, base_norm), plain, (kind, token, place, mode, coft, swap), *_ = self.weights
        at = Strength(strength, mode, coft)
        # Autocast would run the products in half precision. The weights are constants here even where a
        # caller, such as a training node, has gradients switched on.
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if kind == DIFF:
                op, built = Diff.from_state(tensors, plain), None
            else:
                op = LayerRotation.from_state(tensors, plain)
                with normal_tensors():
                    built = cache.rotation(token, place, at, weight.device, op, next(iter(self.loaded_keys)))
            apply_swapped_(op, weight, at, swap, rotation=built, base_row_norm=base_norm)


class ScheduledPatch(RotationPatch):
    """A patch whose strength follows a track: its token is one more item of `weights`."""

    @property
    def oft_factor(self) -> float:
        """The factor on the strength at this moment."""
        return track.now(self.weights[3])

    def calculate_weight(self, weight, key, strength, *args, **more):
        return super().calculate_weight(weight, key, strength * self.oft_factor, *args, **more)


class Keeper:
    """Load callback of a patcher: keeps the batches alive; frees what was built once weights are merged."""

    def __init__(self, kept: Iterable[cache.Batch]):
        self.batches = tuple(kept)

    def __call__(self, patcher: Any, *_: Any) -> None:
        partly = getattr(patcher.model, "model_lowvram", False)
        if not partly and not getattr(patcher, "is_dynamic", lambda: False)():
            cache.release(batch.token for batch in self.batches)


def _base_row_norm(patcher: Any, patch: Patch) -> torch.Tensor:
    """Row norms (rows,) float32 of the layer's unpatched, dequantised weight."""
    weight = layers.plain_weight(patcher, patch.key)
    if weight is None:
        stored = comfy.utils.get_attr(patcher.model, patch.key)
        raise AdapterError(
            "This file needs the row norms of the model's own weights, which this model hides",
            module=patch.module,
            found=f"a weight stored as {stored.dtype}",
            hint="Use an fp16, bf16 or fp8 version of the model.",
        )
    if patch.rows is not None:
        weight = weight.narrow(0, *patch.rows)
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


def patch_objects(
    side: Side, patches: Iterable[Patch], mode: str, coft: str | float, follow: track.Track | None = None
) -> tuple[list[tuple[Patch, RotationPatch]], Keeper]:
    """Each patch as ComfyUI's weight adapter, in order, and what must live beside them.

    follow: the track that their strength follows, None for none.
    """
    patches = list(patches)
    turned = [p for p in patches if isinstance(p.op, LayerRotation)]
    placed = dict(zip(map(id, turned), cache.batches([p.op for p in turned], mode), strict=True))
    out: list[tuple[Patch, RotationPatch]] = []
    for patch in patches:
        tensors, plain = patch.op.to_state()
        batch, place = placed.get(id(patch), (None, 0))
        with normal_tensors():
            norm = _base_row_norm(side.patcher, patch) if patch.op.needs_base_norm else None
        kind, token = (DIFF, 0) if batch is None else (ROTATION, batch.token)
        plan = (kind, token, place, mode, coft, patch.swap_halves)
        weights = ((tensors, norm), plain, plan)
        if follow is None:
            out.append((patch, RotationPatch({patch.module}, weights)))
        else:
            out.append((patch, ScheduledPatch({patch.module}, (*weights, follow.token))))
    return out, Keeper({batch for batch, _ in placed.values()})


def make_patches(
    side: Side, patches: Iterable[Patch], mode: str, coft: str | float, follow: track.Track | None = None
) -> tuple[list[dict], Keeper]:
    """ComfyUI patch dictionaries {key or (key, slice): RotationPatch}, and what must live beside them.

    Several dictionaries only where a file has more than one change for the same rows. The strength is not in
    them: ComfyUI passes it to each patch, and hooks change it while sampling.
    """
    objects, keeper = patch_objects(side, patches, mode, coft, follow)
    out: list[dict[Any, RotationPatch]] = []
    for patch, made in objects:
        key = patch.key if patch.rows is None else (patch.key, (0, *patch.rows))
        free = next((d for d in out if key not in d), None)
        if free is None:
            free = {}
            out.append(free)
        free[key] = made
    return out, keeper


# --- applying a file ----------------------------------------------------------------------------------------


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
    binding, index = _bound(adapter, *_names(sides), absent)
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
        entries += [runtime.Entry(patch, at, made, follow) for patch, made in objects]
        keepers.append(keeper)
    if entries:
        runtime.attach(patcher, runtime.Application(entries, patcher, keepers))
    if follow is not None:
        keys = {patch.key for patch, _ in [*plan.weights, *plan.live]}
        track.attach(patcher, follow, keys, tokens)
        runtime.watch_merging(patcher)
    return clone


def add_hook_patches(hook: Any, side: Side, placed: Iterable[tuple[Patch, Strength]]) -> list[Keeper]:
    """Give a hook its patches for a side; returns what must live as long as they do."""
    keepers = []
    for at, patches in _by_strength((patch, at) for patch, at in placed if at.value != 0).items():
        dictionaries, keeper = make_patches(side, patches, at.mode, at.coft)
        for patch_dict in dictionaries:
            side.patcher.add_hook_patches(hook=hook, patches=patch_dict, strength_patch=at.value)
        keepers.append(keeper)
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
