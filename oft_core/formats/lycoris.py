"""F3, F3a, F3b, F4, F4a: LyCORIS Diag-OFT and BOFT of all ages (output side, exact Cayley)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..layer import LayerRotation
from ..rotation import orthogonality_error
from .common import Maker, Module, Piece, skew_pack
from .kohya import blocks_rotation, limit_for


def read_f3(module: Module) -> Maker:
    """F3: ``oft_blocks`` (n, b, b), optional ``alpha`` (limit) and ``rescale``; M = cayley(A - A^T)^T, rows times rescale."""
    rotation = blocks_rotation(module, module.blocks("oft_blocks"), smooth=False)
    stored = module.tensors.get("rescale")
    if stored is None:
        return lambda shape: [Piece(rotation)]
    factors = module.row_factors("rescale")

    def make(shape: Sequence[int] | None) -> list[Piece]:
        if stored.ndim == 1 and shape is not None and len(shape) == 2 and shape[1] == factors.numel():
            # LyCORIS 2.1.0 kept a flat rescale and multiplied it along the last axis.
            module.context.note("The flat rescale of LyCORIS 2.1.0 acts along the input axis, as that version trained it.")
            return [Piece(replace(rotation, col_scale=factors))]
        return [Piece(replace(rotation, row_scale=factors))]

    return make


def read_f3_diag(module: Module) -> Maker:
    """F3a/F3b: ``oft_diag`` (n, b, b), a finished matrix D with M = D^T, or additive with M = (I + D)^T."""
    d = module.blocks("oft_diag")
    if is_additive(module):
        d = d + torch.eye(d.shape[-1])
    m = d.transpose(-1, -2).contiguous().unsqueeze(0)
    rotation = LayerRotation("out", m.shape[-1], m.shape[1], kind="matrix", matrix=m)
    return lambda shape: [Piece(rotation)]


def is_additive(module: Module) -> bool:
    """F3b or F3a: by option, else whichever of D and I + D is closer to orthogonal up to row scales, backed by the diagonal."""
    choice = module.context.options.oft_diag
    if choice != "auto":
        return choice == "additive"
    d = module.blocks("oft_diag").double()
    mean = float(d.diagonal(dim1=-2, dim2=-1).mean())
    if abs(mean) > 0.6:
        return mean < 0

    def fault(m: torch.Tensor) -> float:
        return float(orthogonality_error(m / m.norm(dim=-2, keepdim=True).clamp_min(1e-12)).max())

    plain, added = fault(d), fault(d + torch.eye(d.shape[-1], dtype=d.dtype))
    if plain < 2e-2 <= added:
        return False
    return mean <= 0.25


def read_f4(module: Module) -> Maker:
    """F4: ``oft_blocks`` (stages, n, b, b); butterfly of cayley(A - A^T), not transposed; one limit over all stages."""
    blocks = module.butterfly("oft_blocks", True)
    _, n, b, _ = blocks.shape
    packed = skew_pack(blocks)
    constraint, alpha = limit_for(module, packed, n * b, smooth=False)
    rotation = LayerRotation(
        "out", b, n, generator=packed, butterfly="lycoris", constraint=constraint,
        core_alpha=alpha if "alpha" in module else None,
        row_scale=module.row_factors("rescale") if "rescale" in module else None,
    )
    return lambda shape: [Piece(rotation)]


def read_f4_diag(module: Module) -> Maker:
    """F4a: ``oft_diag`` (stages, n, b, b), finished butterfly factors."""
    m = module.butterfly("oft_diag", True).contiguous()
    rotation = LayerRotation("out", m.shape[-1], m.shape[1], kind="matrix", matrix=m, butterfly="lycoris")
    return lambda shape: [Piece(rotation)]
