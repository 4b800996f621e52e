"""F5: ComfyUI's own "Train LoRA" node, algorithm OFT (output side, exact Cayley, limit = raw alpha)."""

from __future__ import annotations

from ..constraint import Constraint
from ..layer import Diff
from .common import Maker, Module, Piece
from .kohya import blocks_rotation


def read_f5(module: Module) -> Maker:
    """F5: ``oft_blocks`` with ``alpha`` as a limit on the norm of the whole layer, and plain differences beside them."""
    rotation = blocks_rotation(module, module.blocks("oft_blocks"), smooth=False)
    if rotation.constraint is not None and module.context.options.alpha_rule != "scaled":
        rotation.constraint = Constraint(
            "ComfyUI trainer: alpha over the whole layer", rotation.core_alpha, rotation.constraint.norm
        )
    return lambda shape: [Piece(rotation)]


def differences(module: Module) -> list[Piece]:
    """``diff`` and ``diff_b`` of a module as additive pieces."""
    return [
        Piece(Diff(module.get(suffix)), param)
        for suffix, param in (("diff", "weight"), ("diff_b", "bias"))
        if suffix in module
    ]


def read_differences(module: Module) -> Maker:
    """A module that has only ``diff``/``diff_b`` (norms and biases that the same trainer tuned)."""
    pieces = differences(module)
    return lambda shape: pieces
