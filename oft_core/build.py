"""From stored numbers to the matrices of many layers at one strength."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import blocks as multiply
from .constraint import Strength
from .diff import Diff
from .limits import limits_product, multiplier
from .planes import matrices_from_planes
from .rotation import LARGE_LAM, cayley_float, matrices, unpack_skew
from .spectra import dense, lam_bound, part_size
from .tensors import full_precision, moved
from .threads import spread

if TYPE_CHECKING:
    from .layer import LayerRotation


@dataclass(frozen=True)
class Built:
    """Matrices of one layer at one strength: ``matrices`` (stages, n or 1, b, b) float32, in the order in which they act."""

    matrices: Tensor
    #: Stage numbers in acting order: ascending, or descending for an inverse.
    order: tuple[int, ...]
    #: One dense matrix over the whole axis instead of a butterfly's factors.
    product: bool = False


@full_precision()
def build_all(layers: Sequence, strength: Strength, device: torch.device | str = "cpu") -> list[Built | None]:
    """Matrices of many layers at one strength, batched over all layers of one block size and kind.

    layers: LayerRotation (or Diff, which gives None). Returns one entry per layer, None at strength 0. Float64 inside, float32 out;
    devices without float64 build on the CPU.
    """
    out: list[Built | None] = [None] * len(layers)
    if strength.value == 0:
        return out
    target = torch.device(device)
    where = torch.device("cpu") if target.type in ("mps", "privateuseone", "meta") else target
    scaled = strength.value if strength.mode == "rotation" else 1.0
    groups: dict[tuple, list[tuple[int, int]]] = {}
    pieces: list[list[int]] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, Diff):
            continue
        if directly(layer, strength) and layer.kind != "matrix":
            groups.setdefault((layer.block, layer.kind, layer.terms, _is_large(layer, scaled)), []).append((i, layer.stages * layer.stored))
        else:
            pieces.append([i])
    for (block, *_), members in groups.items():
        pieces += _runs(members, part_size(block, where))

    def work(left: Iterator[list[int]]) -> None:
        for piece in left:
            first = layers[piece[0]]
            if directly(first, strength) and first.kind != "matrix":
                made = _build_together([layers[i] for i in piece], strength, scaled, where)
            else:
                made = [_build_alone(first, strength, where)]
            for i, (m, product) in zip(piece, made, strict=True):
                out[i] = Built(m.to(target, torch.float32), (0,), True) if product else _built(layers[i], m, strength, target)

    spread(work, pieces, where)
    return out


def _build_alone(layer: LayerRotation, strength: Strength, device: torch.device) -> tuple[Tensor, bool]:
    """Matrices of a layer that does not come from its trainer's formula, and whether they are one product of a butterfly."""
    if as_product(layer, strength):
        return _product_power(layer, strength, device), True
    if layer.kind == "matrix" and directly(layer, strength):
        return moved(layer.matrix, device), False
    # In mode linear the strength mixes weights afterwards; the matrix is that of strength 1.
    at = replace(strength, value=1.0) if strength.mode == "linear" else strength
    return matrices_from_planes(layer, at, device), False


def _build_together(
    layers: Sequence[LayerRotation], strength: Strength, scaled: float, device: torch.device
) -> list[tuple[Tensor, bool]]:
    """Float32 matrices of layers of one block size and kind, by their trainer's formula of the generator times ``scaled``."""
    block, kind, terms = layers[0].block, layers[0].kind, layers[0].terms
    large = _is_large(layers[0], scaled)
    limit = [(multiplier(op, strength, device) * scaled).expand(op.stages, op.stored).reshape(-1, 1, 1) for op in layers]
    packed = [moved(op.generator, device).flatten(0, 1) for op in layers]
    flat, scale = (t[0] if len(t) == 1 else torch.cat(t) for t in (packed, limit))
    result = torch.empty(flat.shape[0], block, block, dtype=torch.float32, device=device)
    # In parts that fit the cache, so that the float64 copies stay small.
    for v, by, into in zip(*(t.split(part_size(block, device)) for t in (flat, scale, result)), strict=True):
        q = unpack_skew(v, block).double().mul_(by)
        into.copy_(cayley_float(q) if kind == "cayley" and not large else matrices(kind, terms, q, large))
    parts = result.split([op.stages * op.stored for op in layers])
    return [(m.view(op.stages, op.stored, block, block), False) for op, m in zip(layers, parts, strict=True)]


def _is_large(layer: LayerRotation, scaled: float) -> bool:
    """Whether an exact transform of the generator times ``scaled`` has to come from its planes."""
    return layer.exact and lam_bound(layer) * abs(scaled) > LARGE_LAM


def _runs(sizes: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
    """Neighbours (index, size) joined to runs of at most ``most`` in all; a larger one stands alone."""
    runs: list[list[int]] = []
    room = 0
    for i, size in sizes:
        if size > room:
            runs.append([])
            room = most
        runs[-1].append(i)
        room -= size
    return runs


def _built(layer: LayerRotation, m: Tensor, strength: Strength, device: torch.device) -> Built:
    order = tuple(range(layer.stages))
    if strength.value < 0 and strength.mode in ("rotation", "geodesic"):
        order = order[::-1]
    return Built(m.to(device, torch.float32), order)


def directly(layer: LayerRotation, strength: Strength) -> bool:
    """Whether M comes from the trainer's own formula rather than from invariant planes."""
    if strength.mode in ("linear", "core") or strength.value == 1:
        return not limits_product(layer, strength)
    if layer.kind == "matrix" or strength.mode == "geodesic":
        return False
    # A series inside its safe range is the polynomial of the scaled generator, the same number for less work.
    return layer.exact or abs(strength.value) * lam_bound(layer) <= 0.5


def as_product(layer: LayerRotation, strength: Strength) -> bool:
    """Whether the power of the whole product is wanted: R^s of a butterfly is not the product of its factors' powers."""
    return bool(layer.butterfly) and strength.mode == "geodesic" and not directly(layer, strength)


def _product_power(layer: LayerRotation, strength: Strength, device: torch.device | str) -> Tensor:
    """M^s of a butterfly multiplied out, limits applied, float64 (1, 1, axis, axis). Not kept: it is large.

    Raises StrengthError where the product turns a plane by 180 degrees.
    """
    coft = "file" if isinstance(strength.coft, float) else strength.coft
    if layer.kind == "matrix":
        factors = layer.matrix.double()
    else:
        held = Strength(strength.value if coft == "hold" else 1.0, "geodesic", coft)
        limit = multiplier(layer, held, "cpu").expand(layer.stages, layer.stored)
        raw = dense(layer, "cpu") * limit[..., None, None]
        factors = matrices(layer.kind, layer.terms, raw.flatten(0, 1), _is_large(layer, 1.0)).view_as(raw)
    m = torch.eye(layer.axis, dtype=torch.float64)
    for i, factor in enumerate(factors):
        m = multiply.rotate(m, factor, multiply.butterfly_permutation(layer.butterfly, i, layer.block, layer.axis))
    whole = type(layer)(layer.side, layer.axis, 1, kind="matrix", matrix=m.float()[None, None])
    if layer.exact:  # orthogonal already, so there is nothing to split off
        eye, ones = torch.eye(layer.axis, dtype=torch.float64), torch.ones(1, 1, layer.axis, dtype=torch.float64)
        whole._cache["polar"] = (m[None, None], eye[None, None], ones, ones)
    whole.check_strength(strength)
    return matrices_from_planes(whole, strength, device)
