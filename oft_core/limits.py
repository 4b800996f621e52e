"""What limits a layer's generator: the file's COFT, its spectral clip, and the user's choice about both."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .constraint import Constraint, Strength
from .rotation import lambda_bounds, transform
from .spectra import lam_of, largest_lam, portions
from .tensors import moved

if TYPE_CHECKING:
    from .layer import LayerRotation


def multiplier(layer: LayerRotation, strength: Strength, device: torch.device | str) -> Tensor:
    """Multiplier of the raw generator before the strength, float64, broadcastable to (stages, stored)."""
    if strength.mode == "core":
        return moved(core_constraint(layer).factor(), device)
    one = torch.ones((), dtype=torch.float64, device=device)
    if strength.coft == "off" or layer.kind == "matrix":
        return one
    if strength.coft == "hold" and strength.mode == "geodesic" and layer.kind != "expm":
        return _held_power(layer, abs(strength.value)).to(device)
    held = abs(strength.value) if strength.coft == "hold" and strength.mode != "linear" else 1.0
    factor = one
    if layer.constraint is not None:
        factor = moved(layer.constraint.factor(held), device)
    if layer.clip is not None:
        lam = largest_lam(layer, device) * held * factor
        factor = factor * (layer.clip / lam.clamp_min(1e-30)).clamp_max(1.0)
    if isinstance(strength.coft, float):
        radians, s = torch.pi * strength.coft / 180, abs(strength.value)
        if strength.mode == "geodesic" and s:
            radians /= s  # the angle is multiplied, not the generator
        bound = transform(layer.kind, layer.terms).lam_of_angle(radians)
        scaled = s if strength.mode == "rotation" else 1.0
        lam = largest_lam(layer, device) * factor * scaled
        factor = factor * (bound / lam.clamp_min(1e-30)).clamp_max(1.0)
    return factor


def _held_power(layer: LayerRotation, s: float) -> Tensor:
    """Multiplier of the raw generator with which that of the power M^s, tan(s atan(lam)), keeps the file's limits.

    Found by halving, for a norm over many planes has no closed inverse. Float64, broadcastable to (stages, stored).
    """
    lam, limit = lam_of(layer), layer.constraint
    factor = torch.ones((), dtype=torch.float64)
    if limit is not None:
        planes = (0, 2) if limit.norm.ndim else (0, 1, 2)
        if layer.of_layer is not None and not limit.norm.ndim:
            lam = lam_of(replace(layer, generator=layer.of_layer, of_layer=None, _cache={}))
        # The trainers' norms are all proportional to the root of the planes' squares.
        share = limit.norm.double() / lam.square().sum(planes).sqrt().clamp_min(1e-30)
        low, high = torch.zeros_like(share), torch.ones_like(share)
        for _ in range(60):
            factor = (low + high) / 2
            power = torch.tan((s * torch.atan(lam * factor.unsqueeze(-1))).clamp_max(torch.pi / 2 - 1e-9))
            fits = power.square().sum(planes).sqrt() * share <= limit.limit
            low, high = torch.where(fits, factor, low), torch.where(fits, high, factor)
        factor = high  # 1 where nothing had to be limited
    if layer.clip is not None:
        angle = min(math.atan(layer.clip) / (s or 1.0), math.pi / 2 - 1e-9)
        factor = factor * (math.tan(angle) / (lam_of(layer)[..., -1] * factor).clamp_min(1e-30)).clamp_max(1.0)
    return factor


def series_lam(layer: LayerRotation, strength: Strength) -> float:
    """Largest lam with the limits of ``strength``, exact from 1 on; below 1 it may be an upper bound, which takes less work."""
    limit = multiplier(layer, strength, "cpu").expand(layer.stages, layer.stored)
    if "lam" not in layer._cache:
        rough = (torch.linalg.vector_norm(layer.generator, dim=-1, dtype=torch.float64) * limit).max()
        if float(rough) >= 1:
            flat = [lambda_bounds(part, layer.block)[1] for part in portions(layer.generator.flatten(0, 1), layer.block)]
            rough = (torch.cat(flat).view_as(limit) * limit).max()
        if float(rough) < 1:
            return float(rough)
    return float((largest_lam(layer) * limit).max())


def core_constraint(layer: LayerRotation) -> Constraint:
    """ComfyUI's limit: the norm of all blocks against the raw alpha; zero or absent alpha means none."""
    alpha = layer.core_alpha
    norm = (layer.generator if layer.of_layer is None else layer.of_layer).double().norm() * 2**0.5
    return Constraint("ComfyUI core, raw alpha", alpha if alpha and alpha > 0 else float("inf"), norm)


def limits_product(layer: LayerRotation, strength: Strength) -> bool:
    """Whether a limit in degrees has to be put on finished matrices, or on the product of a butterfly's factors."""
    product = layer.butterfly and strength.mode == "geodesic"
    return (layer.kind == "matrix" or bool(product)) and isinstance(strength.coft, float) and strength.coft < 180
