"""F1, F2: kohya sd-scripts ``networks.oft`` and ``networks.oft_flux`` (output side, exact Cayley, transposed)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..constraint import Constraint
from ..layer import LayerRotation
from .common import Context, Maker, Module, Piece, frobenius, skew_pack

#: sd-scripts stopped rotating the bias while training with commit 93d9fbf6 of 2024-09-13.
BIAS_FIX = 1726185600


def alpha_of(module: Module) -> float | None:
    """The stored constraint; a value lost to float16 underflow is taken from the metadata."""
    alpha = module.number("alpha")
    if alpha == 0:
        context = module.context
        text = context.metadata.get("ss_network_alpha") if "oft" in context.metadata.get("ss_network_module", "") else None
        if text is None:
            text = context.json("ss_network_args").get("constraint")
        try:
            alpha = float(text or 0)
        except (TypeError, ValueError, OverflowError):
            alpha = math.nan
        if not math.isfinite(alpha):
            context.note("The constraint is stored as 0, and the metadata's is no number: no limit is applied.")
            alpha = 0.0
        if alpha:
            context.note(f"The constraint is stored as 0 (lost to half precision); taken from the metadata: {alpha:g}.")
    return alpha


def limit_for(module: Module, packed: Tensor, out_dim: int, smooth: bool) -> tuple[Constraint | None, float]:
    """The COFT limit of an ``oft_blocks`` layer or split, and its raw alpha (0 = none)."""
    alpha = alpha_of(module) or 0.0
    if alpha <= 0:
        return None, 0.0
    raw = module.context.options.alpha_rule == "raw"
    family = "ComfyUI trainer: alpha over the whole layer" if raw else "alpha x output size over the whole layer"
    return Constraint(family, alpha if raw else alpha * out_dim, frobenius(packed, False), smooth), alpha


def rotates_bias(context: Context) -> bool:
    """Whether biases are rotated too: only on request; the report says when the file may have been trained so."""
    started = context.metadata.get("ss_training_started_at", "")
    try:
        old = 0 < float(started or 0) < BIAS_FIX
    except ValueError:
        old = False
    if context.options.rotate_bias == "on":
        return True
    if old and context.options.rotate_bias == "auto":
        context.note(
            "Trained before 2024-09-13: training rotated the biases too, that version's merge did not. Weights only "
            "(read option rotate_bias='on' for the other)."
        )
    return False


def blocks_rotation(module: Module, blocks: Tensor, smooth: bool) -> LayerRotation:
    """(n, b, b) blocks on the output side, M = cayley(A - A^T)^T, limited by alpha times output size."""
    n, b = blocks.shape[0], blocks.shape[-1]
    packed = skew_pack(blocks, -1.0).unsqueeze(0)
    constraint, alpha = limit_for(module, packed, n * b, smooth)
    return LayerRotation("out", b, n, generator=packed, constraint=constraint, core_alpha=alpha)


def read_f1(module: Module) -> Maker:
    """F1: ``oft_blocks`` (network_dim, b, b) and ``alpha``."""
    rotation = blocks_rotation(module, module.blocks("oft_blocks"), smooth=True)
    pieces = [Piece(rotation)]
    if rotates_bias(module.context):
        pieces.append(Piece(rotation, "bias"))
    return lambda shape: pieces


def read_f2(module: Module) -> Maker:
    """F2: ``oft_blocks.0 ...``, one set of blocks and one limit per split of the output rows."""
    numbers = sorted(int(s.rsplit(".", 1)[1]) for s in module.tensors if s.startswith("oft_blocks."))
    if numbers != list(range(len(numbers))):
        raise module.format_error("The splits of a fused layer are not complete", found=numbers)
    pieces: list[Piece] = []
    start = 0
    for i in numbers:
        rotation = blocks_rotation(module, module.blocks(f"oft_blocks.{i}"), smooth=True)
        rotation.core_alpha = None
        pieces.append(Piece(rotation, rows=(start, rotation.axis)))
        start += rotation.axis

    def make(shape: Sequence[int] | None) -> list[Piece]:
        if shape is not None and shape[0] != start:
            raise module.shape_error("The splits do not add up to the layer's output size", f"{start} rows", f"{shape[0]} rows")
        return pieces

    return make
