"""The planes that a layer's stored numbers have of themselves, before any limit or strength. Kept with the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rotation import (
    Spectrum,
    generator_spectrum,
    lambdas,
    large_spectrum,
    polar,
    rotation_spectrum,
    unpack_skew,
)

if TYPE_CHECKING:
    from .layer import LayerRotation

#: Norm of a generator up to which real eigenvectors, kept in float32, give powers orthogonal to 1e-6.
_REAL_PLANES = 2.0


def dense(layer: LayerRotation, device: torch.device | str) -> Tensor:
    """Skew generator without any limit, float64 (stages, stored, b, b)."""
    return unpack_skew(layer.generator.to(device, torch.float64), layer.block)


def lam_bound(layer: LayerRotation) -> float:
    """Upper bound of lam without limits, cheap: Frobenius norm over sqrt(2). Cached."""
    if "bound" not in layer._cache:
        layer._cache["bound"] = float(torch.linalg.vector_norm(layer.generator, dim=-1).max()) * (1 + 1e-6)
    return layer._cache["bound"]


def lam_of(layer: LayerRotation) -> Tensor:
    """lam of every plane without limits (two equal values a plane), float64 (stages, stored, b), ascending. Cached."""
    if "lam" not in layer._cache:
        parts = []
        for part in portions(layer.generator.flatten(0, 1), layer.block):
            parts.append(lambdas(unpack_skew(part.double(), layer.block)))
        layer._cache["lam"] = torch.cat(parts).view(layer.stages, layer.stored, layer.block)
    return layer._cache["lam"]


def largest_lam(layer: LayerRotation, device: torch.device | str = "cpu") -> Tensor:
    """Largest lam of every stored block without limits, float64 (stages, stored)."""
    return lam_of(layer)[..., -1].to(device)


def spectrum_of(layer: LayerRotation) -> Spectrum:
    """Planes of the unlimited generator, or of the orthogonal part of finished matrices; (stages, stored, ...). Cached."""
    if "spectrum" not in layer._cache:
        if layer.kind == "matrix":
            found = rotation_spectrum(polar_of(layer)[0])
            # Close to a half turn the direction is a quotient of small numbers.
            layer._cache["spectrum"] = found if float(found.planes.max()) > 2.8 else found.single()
        else:
            planes = generator_spectrum if lam_bound(layer) <= _REAL_PLANES else large_spectrum
            parts = [planes(unpack_skew(p.double(), layer.block)).single() for p in portions(layer.generator.flatten(0, 1), layer.block)]
            layer._cache["spectrum"] = Spectrum(
                *(
                    torch.cat([getattr(p, name) for p in parts]).unflatten(0, (layer.stages, layer.stored))
                    for name in ("vectors", "planes", "turn", "turn_size")
                )
            )
    return layer._cache["spectrum"]


def polar_of(layer: LayerRotation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Finished matrices as diag(rows) U (V diag(sigma) V^T): U, V, sigma, rows; float64. Cached.

    A rescale folded into the matrix shows as row norms away from 1 of an otherwise orthogonal matrix; a merely non-orthogonal
    matrix (additive dialect) keeps rows = 1.
    """
    if "polar" not in layer._cache:
        m = layer.matrix.double()
        rows = m.norm(dim=-1)
        gram = (m / rows.unsqueeze(-1).clamp_min(1e-30)) @ (m / rows.unsqueeze(-1).clamp_min(1e-30)).transpose(-1, -2)
        eye = torch.eye(layer.block, dtype=m.dtype)
        folded = (gram - eye).abs().amax() < 2e-2 and (rows - 1).abs().amax() > 2e-3
        rows = rows if folded else torch.ones_like(rows)
        layer._cache["polar"] = (*polar(m / rows.unsqueeze(-1)), rows)
    return layer._cache["polar"]


def part_size(block: int, device: torch.device) -> int:
    """Blocks whose float64 matrices fill 1 MiB on a CPU (its cache), 64 MiB elsewhere."""
    return max(1, (1 << 17 if device.type == "cpu" else 1 << 23) // (block * block))


def portions(flat: Tensor, block: int) -> list[Tensor]:
    """Split (blocks, ...) into parts of that size."""
    return list(flat.split(part_size(block, flat.device)))
