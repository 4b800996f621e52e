"""COFT: limits on the size of the generator, as the different trainers apply them, and the user's choice about them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import StrengthError

COFT_CHOICES = ("file", "hold", "off")
MODES = ("rotation", "geodesic", "linear", "core")


def coft_choice(value: str | float) -> str | float:
    """``file``, ``hold``, ``off`` or a number of degrees in (0, 180], given as text or number. Raises StrengthError otherwise."""
    if isinstance(value, str) and value in COFT_CHOICES:
        return value
    try:
        degrees = float(value)
    except ValueError:
        degrees = math.nan
    if not 0 < degrees <= 180:
        raise StrengthError(
            "Unknown COFT choice", found=repr(value), expected="file, hold, off or degrees above 0 and up to 180"
        )
    return degrees


@dataclass(frozen=True)
class Strength:
    """How strongly an adapter acts.

    value: the slider, any finite number; 0 is the base model, 1 the file.
    mode: ``rotation`` (generator scaled), ``geodesic`` (matrix power R^s), ``linear`` (W + s(W' - W)), ``core`` (what ComfyUI's own
    loader computes for the files that it reads).
    coft: ``file`` (the file's limit, then strength), ``hold`` (the limit also holds for the scaled generator), ``off``, or degrees:
    after strength no block turns any plane further than this, on top of the file's own limit.
    """

    value: float = 1.0
    mode: str = "rotation"
    coft: str | float = "file"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise StrengthError("Unknown strength mode", found=repr(self.mode), expected=" or ".join(MODES))
        if not math.isfinite(self.value):
            raise StrengthError("Strength is not a finite number", found=self.value)
        object.__setattr__(self, "coft", coft_choice(self.coft))


def limit_factor(norm: Tensor, limit: float | Tensor, smooth: bool) -> Tensor:
    """Multiplier that brings a norm to a limit, as ``Constraint`` describes; shape of ``norm``."""
    if smooth:
        return (torch.clamp(norm, max=limit) + 1e-8) / (norm + 1e-8)
    return (limit / norm.clamp_min(1e-30)).clamp_max(1.0)


@dataclass(frozen=True)
class Constraint:
    """A limit on a norm of the generator: the generator is multiplied by ``factor``.

    family: which rule, in words for the report.   limit: the largest norm allowed, in the trainer's own measure.
    norm: the measured norm at strength 1, shape () for one limit over the whole layer or (blocks,) for one per block, float32.
    smooth: kohya's (min(norm, limit) + 1e-8) / (norm + 1e-8) instead of the plain min(1, limit / norm).
    """

    family: str
    limit: float
    norm: Tensor
    smooth: bool = False

    def factor(self, s: float = 1.0) -> Tensor:
        """Multiplier of the generator, shape of ``norm``, when the generator is scaled by s."""
        return limit_factor(self.norm.double() * abs(s), self.limit, self.smooth)

    def use(self) -> float:
        """Largest share of the radius that the stored generator takes; above 1 the limit is active."""
        return float(self.norm.max()) / self.limit if self.limit > 0 else math.inf
