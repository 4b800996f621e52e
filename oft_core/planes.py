"""A layer's invariant planes at a strength, and matrices and logarithms made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .constraint import Strength
from .limits import multiplier
from .rotation import Spectrum, scaled_planes, transform
from .spectra import polar_of, spectrum_of

if TYPE_CHECKING:
    from .layer import LayerRotation


def planes_at(layer: LayerRotation, strength: Strength, device: torch.device | str) -> tuple[Spectrum, Tensor, Tensor]:
    """Invariant planes, and gain and angle of M in each of them at this strength; all float64, (stages, stored, b).

    Of finished matrices the planes of the orthogonal part; their stretching is not in the gain.
    """
    s = strength.value
    sp = spectrum_of(layer).double(device)
    if layer.kind == "matrix":
        angle = s * sp.planes
        if isinstance(strength.coft, float):
            top = angle.abs().amax(-1, keepdim=True)
            angle = angle * (torch.pi * strength.coft / 180 / top.clamp_min(1e-30)).clamp_max(1.0)
        return sp, torch.ones_like(angle), angle
    kind = transform(layer.kind, layer.terms)
    lam = sp.planes * multiplier(layer, strength, device).expand(layer.stages, layer.stored).unsqueeze(-1)
    if strength.mode == "geodesic":
        gain, angle = kind.plane(lam)
        return sp, gain.pow(s), angle * s
    return sp, *scaled_planes(kind, lam, s)


def matrices_from_planes(layer: LayerRotation, strength: Strength, device: torch.device | str) -> Tensor:
    """M of every stage and stored block by its invariant planes, float64 (stages, stored, b, b)."""
    s = strength.value
    sp, gain, angle = planes_at(layer, strength, device)
    turned = sp.apply(gain * torch.cos(angle), gain * torch.sin(angle))
    if layer.kind != "matrix":
        return turned
    _, vectors, sigma, rows = (t.to(device) for t in polar_of(layer))
    # M = D U P and its power D^s U^s P^s; the inverse order for negative s makes M(-s) M(s) = I.
    stretch = (vectors * sigma.pow(s).unsqueeze(-2)) @ vectors.transpose(-1, -2)
    rows = rows.pow(s)
    return rows.unsqueeze(-1) * (turned @ stretch) if s > 0 else (stretch @ turned) * rows.unsqueeze(-2)


def logarithm(layer: LayerRotation, strength: Strength) -> Tensor:
    """log M of every stage and stored block at a strength, float64 (stages, stored, b, b); skew where M is orthogonal.

    strength: mode rotation or geodesic, for which ``check_strength`` passes. Row and column factors are not in it, nor is the
    stretching of a finished matrix that is not orthogonal. The angle is the one turned by, also above 180 degrees.
    """
    sp, gain, angle = planes_at(layer, strength, "cpu")
    return sp.apply(gain.clamp_min(1e-30).log(), angle)
