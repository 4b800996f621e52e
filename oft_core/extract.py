"""Rotations that explain how weights have changed: orthogonal Procrustes, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .changed import Changed
from .constraint import Strength
from .diff import Diff
from .errors import AdapterError, printable
from .formats.common import side_length
from .formats.write import peft_block_size
from .formats.write_beside import BaseWeights
from .layer import LayerRotation
from .names import NameIndex
from .rotation import pack_skew, rotation_spectrum
from .tensors import full_precision

#: Share of the change below which a rotation is the wrong tool.
EXPLAINED = 0.5
#: Rounds of fitting rotation and row factors in turn.
_ROUNDS = 30


@dataclass(frozen=True)
class Fit:
    """How well a rotation tells the change of one weight.

    change: |W' - W| / |W|.   remainder: |W' - fit| / |W' - W|, 0 for a rotation, 1 or so where it explains nothing.
    angle: largest angle in degrees.   size: |W' - W|, for sums over layers.
    """

    key: str
    side: str
    block: int
    change: float
    remainder: float
    angle: float
    size: float


def fit(base: Tensor, tuned: Tensor, side: str, block: int, *, rescale: bool = False) -> LayerRotation:
    """The rotation of one side with blocks of ``block`` that brings ``base`` (out, ...) nearest to ``tuned``.

    Minimises |W' - M W| (``out``) or |W' - W M^T| (``in``) in the Frobenius norm (Schoenemann 1966), proper rotations only; rescale:
    with a factor for every row as well, found in turn. Float64 inside. Raises ShapeError if the block does not divide the side.
    """
    a, t = (w.detach().to("cpu", torch.float64).flatten(1) for w in (base, tuned))
    size = side_length(base.shape, side)
    count = size // block
    layer = LayerRotation(side, block, count, generator=torch.zeros(1, count, block * (block - 1) // 2))
    layer.check_shape(base.shape)
    rows = None
    m = _nearest(a, t, side, block)
    for _ in range(_ROUNDS if rescale else 0):
        turned = _turned(a, m, side)
        new = (t * turned).sum(1) / turned.square().sum(1).clamp_min(1e-300)
        new = torch.where(new > 1e-3, new, torch.ones_like(new))
        if rows is not None and torch.allclose(new, rows, rtol=1e-9, atol=0):
            break
        rows = new
        m = _nearest(a, t * rows.unsqueeze(1) if side == "in" else t / rows.unsqueeze(1), side, block)
    planes = rotation_spectrum(m)
    # Just below a half turn the generator of Cayley's transform is still a number.
    angle = planes.planes.clamp(-math.pi + 1e-6, math.pi - 1e-6)
    layer.generator = pack_skew(planes.apply(torch.zeros_like(angle), torch.tan(angle / 2))).float().unsqueeze(0)
    layer.row_scale = None if rows is None else rows.float()
    return layer


def _nearest(a: Tensor, t: Tensor, side: str, block: int) -> Tensor:
    """Proper rotations (n, b, b) float64 by the singular vectors of T A^T, block by block."""
    if side == "out":
        x, y = t.view(-1, block, t.shape[1]), a.view(-1, block, a.shape[1])
        product = x @ y.transpose(1, 2)
    else:
        x, y = (w.view(w.shape[0], -1, block).permute(1, 2, 0) for w in (t, a))
        product = x @ y.transpose(1, 2)
    u, _, vh = torch.linalg.svd(product)
    flip = torch.linalg.eigvals(u @ vh).prod(-1).real.sign()  # of the determinant, without LU
    u[..., -1] *= flip.unsqueeze(-1)
    return u @ vh


def _turned(a: Tensor, m: Tensor, side: str) -> Tensor:
    b = m.shape[-1]
    if side == "out":
        return (m @ a.view(-1, b, a.shape[1])).reshape(a.shape)
    return torch.einsum("rni,nji->rnj", a.view(a.shape[0], -1, b), m).reshape(a.shape)


def assessed(key: str, base: Tensor, tuned: Tensor, layer: LayerRotation) -> Fit:
    """What a layer leaves unexplained, measured with the layer as it will be applied."""
    got = base.to(torch.float32, copy=True)
    layer.apply_(got, Strength())
    size = float((tuned.double() - base.double()).norm())
    left = float((tuned.double() - got.double()).norm())
    angle = math.degrees(float(layer.angles().max()))
    return Fit(key, layer.side, layer.block, size / max(float(base.double().norm()), 1e-30), left / max(size, 1e-30), angle, size)


@dataclass(frozen=True)
class Extracted:
    """Rotations of one side, what lies beside them (biases, norms), and how good they are; left: keys that no rotation can tell."""

    side: str
    layers: dict[str, LayerRotation]
    beside: dict[str, Diff]
    fits: list[Fit]
    left: list[str]

    @property
    def explained(self) -> float:
        """Share of the squared change of all fitted weights that the rotations tell, 0 to 1 (below 0: worse than nothing)."""
        whole = sum(f.size**2 for f in self.fits)
        return 1 - sum((f.remainder * f.size) ** 2 for f in self.fits) / whole if whole else 1.0


@full_precision()
def extract(
    index: NameIndex, base: BaseWeights, changed: Changed, *, block: int = 32, sides: Sequence[str] = ("in", "out"), rescale: bool = False,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Extracted:
    """The rotations that tell best how ``changed`` differs from ``base``, all of the side that tells more.

    block: wanted size of blocks; a layer takes the nearest that divides it.   sides: those to try.   rescale: row factors too.
    progress: wraps the keys, such as a bar. Raises AdapterError where nothing has changed that a rotation could tell.
    """
    weights = {k: f for k, f in changed.items() if index.spelling(k) is not None and len(index.shapes[k]) >= 2}
    beside: dict[str, Diff] = {}
    tried: dict[str, tuple[dict[str, LayerRotation], list[Fit]]] = {side: ({}, []) for side in sides}
    for key in progress(weights):
        before, after = base(key).float(), weights[key]()
        for side, (layers, fits) in tried.items():
            layer = fit(before, after, side, peft_block_size(side_length(before.shape, side), block), rescale=rescale)
            layers[key] = layer
            fits.append(assessed(key, before, after, layer))
    if not weights:
        raise AdapterError("No weight has changed", found=f"{len(changed)} other parameters that differ", expected="layers that were trained")
    left = []
    for key in (k for k in changed if k not in weights):
        if len(index.shapes[key]) == 1 and any(index.spelling(k) is not None for k in (key, key.removesuffix("bias") + "weight")):
            beside[key] = Diff(changed[key]() - base(key).float())
        else:
            left.append(key)
    done = [Extracted(side, layers, beside, fits, sorted(left)) for side, (layers, fits) in tried.items()]
    return max(done, key=lambda e: e.explained)


def table(fits: Sequence[Fit]) -> str:
    """One line a layer: side and size of its blocks, how far it has changed, what is left of that, the largest angle."""
    wide = max((len(f.key) for f in fits), default=0)
    lines = [f"{'layer':{wide}}  side  block  change    left   angle"]
    lines += [
        f"{f.key:{wide}}  {f.side:4} {f.block:6} {100 * f.change:6.2f} % {100 * f.remainder:5.1f} % {f.angle:7.2f}" for f in fits
    ]
    return "\n".join(printable(line, 1000) for line in lines)
