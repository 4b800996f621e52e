"""A built rotation with its factors, applied to a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import blocks as multiply
from .build import Built
from .constraint import Strength
from .errors import ShapeError
from .tensors import full_precision, moved

if TYPE_CHECKING:
    from .layer import LayerRotation


@dataclass(frozen=True)
class Factors:
    """One rotation at one strength as plain numbers, in the terms of ``blocks.transform_``."""

    stages: list[Tensor]
    permutations: list[Tensor | None] | None
    rows: Tensor | None
    cols: Tensor | None
    mix: float | None
    inverse: bool
    count: int
    #: (axis, b) orthonormal, of the subspace that the one stage turns; None: the entries themselves.
    basis: Tensor | None = None


@full_precision()
def apply_layer_(
    layer: LayerRotation,
    weight: Tensor,
    strength: Strength,
    *,
    rotation: Built | None = None,
    measured: Tensor | None = None,
) -> None:
    """Apply to ``weight`` (out, ...) in place, block by block; float32 arithmetic, one rounding to the weight's dtype.

    weight: any floating dtype and device; a row slice of a larger tensor is fine. rotation: what ``build`` gave for the same
    strength, to save building it again. measured: what ``LayerRotation.measure`` gave of the unpatched weight, needed if
    ``needs_base``.
    In the modes rotation and geodesic a negative strength undoes the positive one: M(-s) = M(s)^-1, row factors in reverse order.
    """
    built = rotation if rotation is not None else layer.build(strength, weight.device)
    if built is None:
        return
    if layer.added is not None:
        _apply_added_(layer, weight, strength, built)
        return
    _multiply_(layer, weight, built, measured, strength)


def _apply_added_(layer: LayerRotation, weight: Tensor, strength: Strength, built: Built) -> None:
    """DoKr-OFT: rotate the sum of weight and difference. The only form that needs a full-size float32 copy."""
    s = strength.value
    delta = moved(layer.added, weight.device, torch.float32).reshape(weight.shape)
    if strength.mode == "linear":
        work = weight.float() + delta
        _multiply_(layer, work, built, None, Strength())
        work = torch.lerp(weight.float(), work, s)
    else:
        work = torch.add(weight.float(), delta, alpha=s)
        _multiply_(layer, work, built, None, strength)
    multiply.store_(weight, work)


def row_factors(layer: LayerRotation, norm: Tensor | None, device: torch.device | str) -> Tensor | None:
    """Row factors at strength 1, float32 (out,) on ``device``; None without any.

    norm: (out,) the row norms that ``norm_of`` asks for. Raises ShapeError if they are needed and absent.
    """
    if layer.row_scale is None:
        return None
    rows = moved(layer.row_scale, device, torch.float32)
    if layer.norm_of:
        if norm is None:
            raise ShapeError("The row norms of the unpatched weight are needed for this layer (dora_scale)")
        rows = rows / moved(norm, device, torch.float32).clamp_min(1e-12)
    return rows


def _multiply_(layer: LayerRotation, weight: Tensor, built: Built, measured: Tensor | None, strength: Strength) -> None:
    if layer.row_scale is not None and layer.norm_of == "current":
        measured = multiply.row_norms(weight)
    f = factors_of(layer, built, measured, strength, weight.device)
    if f.basis is not None:
        multiply.turn_subspace_(weight, f.stages[0][0], f.basis, side=layer.side, mix=f.mix)
        return
    multiply.transform_(
        weight, f.stages, side=layer.side, count=f.count, permutations=f.permutations, rows=f.rows, cols=f.cols, mix=f.mix,
        inverse=f.inverse, memory_view=layer.memory_view,
    )


def factors_of(layer: LayerRotation, built: Built, measured: Tensor | None, strength: Strength, device: torch.device | str) -> Factors:
    """What the rotation at a strength multiplies with. measured: what the layer needs of the weight. Raises ShapeError where it is missing."""
    rows, basis = row_factors(layer, measured, device), None
    if layer.subspace:
        basis = layer.basis if layer.basis is not None else measured
        if basis is None:
            raise ShapeError("The directions of the unpatched weight are needed for this layer (PSOFT)")
        basis = moved(basis, device, torch.float32)
    s, mode = strength.value, strength.mode
    cols = None if layer.col_scale is None else moved(layer.col_scale, device, torch.float32)
    matrices = moved(built.matrices, device)
    stages = [matrices[i] for i in built.order]
    mix: float | None = None
    inverse = False
    if mode == "core":
        mix = s if layer.butterfly else s * s
        if layer.butterfly:
            eye = torch.eye(layer.block, device=device)
            stages = [torch.lerp(eye.expand_as(m), m, s) for m in stages]
        else:
            rows = cols = None
    elif mode == "linear":
        mix = None if s == 1 else s
    else:
        rows, cols = powered(rows, s), powered(cols, s)
        inverse = s < 0
    index: list[Tensor | None] | None = None
    count = layer.count
    if built.product:
        count = 1
    elif layer.butterfly:
        index = [multiply.butterfly_permutation(layer.butterfly, i, layer.block, layer.axis, device) for i in built.order]
    return Factors(stages, index, rows, cols, mix, inverse, count, basis)


def powered(factors: Tensor | None, s: float) -> Tensor | None:
    """Row or column factors at strength s in the rotation modes: m^s, or 1 + s(m - 1) for a factor that is not positive."""
    if factors is None:
        return None
    # The bounds keep the square of a factor, and its inverse, inside float32.
    return torch.where(factors > 0, factors.clamp(1e-15, 1e15).pow(s), 1 + s * (factors - 1))
