"""F15: the paper's repository (Zeju1997/oft), attention processors of the DreamBooth and text-to-image scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..constraint import Constraint
from ..layer import LayerRotation
from .common import Maker, Module, Piece, block_count, skew_pack


def read_f15(module: Module) -> Maker:
    """``R`` (r, b, b) or (b, b) on the input side, W cayley((A - A^T)/2); limit eps b^2 / sqrt(r) per block on ||A||."""
    a = module.get("R")
    share = a.ndim == 2
    if share:
        a = a.unsqueeze(0)
    if a.ndim != 3 or a.shape[-1] != a.shape[-2] or a.numel() == 0:
        raise module.shape_error("'R' must hold square blocks", tuple(a.shape), "(r, b, b) or (b, b)")
    stored, b = a.shape[0], a.shape[-1]
    packed = skew_pack(a, -0.5).unsqueeze(0)
    limit = None
    if module.number("oft_is_coft"):
        eps = module.context.limit("oft_eps", module.number("oft_eps"))
        limit = Constraint(
            "paper repository: eps x block size^2 / sqrt(r), per block",
            (6e-5 if eps is None else eps) * b * b / math.sqrt(stored), a.flatten(1).norm(dim=1),
        )

    def make(shape: Sequence[int] | None) -> list[Piece]:
        count = block_count(module, stored, b, shape, "in", share)
        return [Piece(LayerRotation("in", b, count, generator=packed, constraint=limit))]

    return make
