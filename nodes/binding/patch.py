"""The patch object: what an adapter's layer is in `ModelPatcher.patches`.

An OFT patch is a multiplication, so it cannot be handed over as an additive difference. It is a weight
adapter object that rotates the weight in place when ComfyUI asks for it: on a full load, on every forward of
a partly loaded model, for hooks, and when a checkpoint is saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy.weight_adapter.base import WeightAdapterBase

from ...oft_core import AdapterError, Diff, LayerRotation, Patch, Strength, cache
from ...oft_core.adapter import apply_swapped_
from ...oft_core.tensors import normal_tensors
from . import layers, track
from .names import Side

# What a patch holds: a rotation, or an additive difference (norms and biases of some files).
ROTATION, DIFF = "rotation", "diff"


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
        (tensors, measured), plain, (kind, token, place, mode, coft, swap), *_ = self.weights
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
            apply_swapped_(op, weight, at, swap, rotation=built, measured=measured)


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


def _measured(patcher: Any, patch: Patch) -> torch.Tensor:
    """What a patch needs of its layer's unpatched, dequantised weight, see `Patch.measure`."""
    weight = layers.plain_weight(patcher, patch.key)
    if weight is None:
        stored = comfy.utils.get_attr(patcher.model, patch.key)
        raise AdapterError(
            "This file depends on the model's own weights, which this model hides",
            module=patch.module,
            found=f"a weight stored as {stored.dtype}",
            hint="Use an fp16, bf16 or fp8 version of the model.",
        )
    return patch.measure(weight)


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
            measured = _measured(side.patcher, patch) if patch.op.needs_base else None
        kind, token = (DIFF, 0) if batch is None else (ROTATION, batch.token)
        plan = (kind, token, place, mode, coft, patch.swap_halves)
        weights = ((tensors, measured), plain, plan)
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
