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


#: suffix -> (parameter, whether it is the new value itself): ComfyUI's and LyCORIS's differences, PEFT's whole parameters.
DIFFERENCES = {
    "diff": ("weight", False), "diff_b": ("bias", False), "w_norm": ("weight", False), "b_norm": ("bias", False),
    "whole": ("weight", True), "whole_b": ("bias", True),
}


def differences(module: Module) -> list[Piece]:
    """Differences and whole values of a module's weight and bias as additive pieces."""
    return [
        Piece(Diff(module.get(suffix), whole=whole), param) for suffix, (param, whole) in DIFFERENCES.items() if suffix in module
    ]


def read_differences(module: Module) -> Maker:
    """A module that has only differences: norms, biases and whole layers that were trained beside the rotations."""
    pieces = differences(module)
    return lambda shape: pieces
