"""An additive difference beside the rotations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import blocks as multiply
from .constraint import Strength
from .errors import ShapeError, ValueFault
from .tensors import moved

#: Numbers of factors, differences and matrices from which on a weight at strength 2 may leave float32.
LARGEST_FACTOR = 1e9


@dataclass(frozen=True)
class Diff:
    """An additive difference (``.diff`` of a weight, ``.diff_b`` of a bias), linear in the strength in every mode.

    whole: ``delta`` is the new value itself, as PEFT stores it; the difference is then to the value that is found.
    """

    delta: Tensor
    needs_base: bool = False
    whole: bool = False

    def build(self, strength: Strength, device: torch.device | str = "cpu") -> None:
        return None

    def check_shape(self, shape: Sequence[int], *, module: str | None = None, file: str | None = None) -> None:
        """Raises ShapeError if the difference has another number of rows or values than the parameter."""
        # A 1x1 convolution's difference may come as a matrix, but rows stay rows.
        if math.prod(shape) != self.delta.numel() or self.delta.shape[:1] != torch.Size(shape[:1]) and self.delta.numel() > 1:
            raise ShapeError(
                "An additive difference does not fit the parameter", file=file, module=module,
                found=tuple(self.delta.shape), expected=tuple(shape),
            )

    def check_strength(self, strength: Strength, *, module: str | None = None, file: str | None = None) -> None:
        return None

    def check_values(self, *, module: str | None = None, file: str | None = None) -> None:
        """Raises ValueFault if the numbers are finite but too large for a weight."""
        fault = too_large("a difference", self.delta)
        if fault is not None:
            raise ValueFault(
                "The file's numbers are too large", file=file, module=module, found=fault, expected="a difference of weights",
                hint="The training run broke; use an earlier save.",
            )

    def rows_slice(self, start: int, length: int, *, module: str | None = None) -> Diff:
        """The part for the output rows start ... start+length."""
        return replace(self, delta=self.delta[start : start + length])

    def apply_(self, weight: Tensor, strength: Strength, *, rotation: None = None, measured: Tensor | None = None) -> None:
        """weight += s * delta, or s * (delta - weight) for whole values, in place, float32 arithmetic."""
        delta = moved(self.delta, weight.device, torch.float32).reshape(weight.shape)
        if self.whole:
            changed = torch.lerp(weight.float(), delta, strength.value)
        else:
            changed = torch.add(weight.float(), delta, alpha=strength.value)
        multiply.store_(weight, changed)

    def to_state(self) -> tuple[tuple[Tensor | None, ...], tuple]:
        return (self.delta,), ("diff", self.whole)

    @classmethod
    def from_state(cls, tensors: Sequence[Tensor | None], plain: Sequence) -> Diff:
        return cls(tensors[0], whole=plain[1])


def too_large(what: str, numbers: Tensor) -> str | None:
    """What is wrong with factors, differences or matrices that no weight can take; None if nothing is."""
    low, high = (float(x) for x in torch.aminmax(numbers)) if numbers.numel() else (0.0, 0.0)
    if low >= -LARGEST_FACTOR and high <= LARGEST_FACTOR:
        return None
    size = max(-low, high)
    return f"{what} of size {size:.3g}" if math.isfinite(size) else f"{what} that are not finite"
