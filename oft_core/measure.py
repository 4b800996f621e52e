"""How far the layers of a file turn and how orthogonal they are, measured over all layers at once and without building them.

The largest angle is exact: bounds from norms and a few products of matrices leave out every block that cannot hold it, and only the
rest is decomposed. The mean needs every plane of every block; of many blocks it is taken from a sample. Work and memory grow with the
numbers that are stored, whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .build import build_all
from .constraint import Strength, limit_factor
from .limits import core_constraint, multiplier
from .rotation import lambda_bounds, lambdas, orthogonality_error, transform, unpack_skew
from .spectra import lam_of, largest_lam, spectrum_of
from .threads import spread, undivided

if TYPE_CHECKING:
    from .layer import LayerRotation

#: Above this many numbers times block size, two products of every block would take seconds; all measures are then estimates.
EXACT_WORK = 10**10
#: The same for the decompositions that the largest angle may take, and for those that the mean may take.
TOP_WORK, MEAN_WORK = 4 * 10**9, 2 * 10**7
#: |M^T M - I| that rounding an orthogonal M to float32 can give (2^-23), and what building it in float64 adds at most.
ROUNDING = 2.0**-23 + 2e-8
#: Largest block of an estimate that is decomposed; of larger ones some Lanczos steps are taken.
_DECOMPOSED, _STEPS = 512, 32
#: Blocks that are decomposed at a time, and the strongest ones that an estimate looks at.
_BATCH, _STRONGEST = 32, 16
#: Numbers that a part holds while bounds are computed; smaller layers are joined up to a quarter of that.
_PART = 1 << 17


@dataclass(frozen=True)
class Measures:
    """Angles in radians at strength 1, limits applied. None of these without a rotation.

    top: the largest.   mean: over all planes of all blocks.   top_estimated, mean_estimated: from the strongest blocks and a sample
    only.   error: upper bound of |M^T M - I| over the entries of all blocks, None if there is nothing to bound it with.
    diverging: indices of the layers whose Neumann series diverges.   reach: the largest angle at the strength itself.
    """

    top: float | None = None
    mean: float | None = None
    top_estimated: bool = False
    mean_estimated: bool = False
    error: float | None = None
    diverging: tuple[int, ...] = ()
    reach: float | None = None


def measure(rotations: Sequence[LayerRotation], strength: Strength | None = None) -> Measures:
    """Measures of layers, with the limits that ``strength.coft`` chooses. Float64 where exact; deterministic."""
    if not rotations:
        return Measures()
    with undivided():
        return _measure(rotations, strength or Strength())


def _measure(rotations: Sequence[LayerRotation], strength: Strength) -> Measures:
    groups: dict[tuple, list[int]] = {}
    for i, r in enumerate(rotations):
        groups.setdefault((r.kind, r.terms if r.kind.startswith("neumann") else 0, r.block), []).append(i)
    finished = [_Finished(rotations, members) for (kind, _, _), members in groups.items() if kind == "matrix"]
    stored = [_Generators(rotations, members) for (kind, _, _), members in groups.items() if kind != "matrix"]
    rough = sum(len(g.norm) * g.block**3 for g in stored) > EXACT_WORK
    degrees = math.radians(strength.coft) if isinstance(strength.coft, float) else math.inf
    top = reach = error = 0.0
    sums = np.zeros(2)
    top_estimated = mean_estimated = rough
    diverging: list[int] = []
    tops: dict[tuple, float] = {}
    for g in stored:
        scale, clip = g.limits(strength, 1.0)
        key = (g.kind, g.terms)
        lam, complete = g.largest(scale, clip, tops.get(key, 0.0), rough)
        tops[key] = max(lam, tops.get(key, 0.0))
        top_estimated |= not complete
        by_angle = np.minimum(clip, g.transform.lam_of_angle(degrees)) if degrees < math.pi else clip
        mean, complete = g.mean(scale, by_angle, rough)
        mean_estimated |= not complete
        sums += len(g.norm) * g.block * np.array([mean, 1.0])
        reach = max(reach, g.reach(lam, strength, rough))
        if g.kind.startswith("neumann"):
            diverging += g.beyond_one(scale, by_angle, rough)
    for (kind, terms), lam in tops.items():
        top = max(top, _angle(transform(kind, terms or 5), lam))
        error = max(error, _series_error(kind, terms, lam))
    cut = [r for r in rotations if r.kind != "matrix" and r.axis % r.block]
    for r, built in zip(cut, build_all(cut, Strength()), strict=True):
        rest = r.axis % r.block
        error = max(error, float(orthogonality_error(built.matrices[:, -1, :rest, :rest].double()).max()))
    top = min(top, degrees)
    for f in finished:
        found = f.measure()
        top, error = max(top, found.top), max(error, found.error)
        top_estimated |= found.top_estimated
        mean_estimated |= found.mean_estimated
        sums += len(f) * f.block * np.array([found.mean, 1.0])
        reach = max(reach, min(abs(strength.value) * found.top, degrees))
    return Measures(
        top, float(sums[0] / sums[1]), top_estimated, mean_estimated, error, tuple(sorted(diverging)), min(reach, degrees)
    )


def layer_angles(layer: LayerRotation, strength: Strength | None = None) -> Tensor:
    """Rotation angle in radians of every plane (stages, stored, b) at strength 1, limits applied as ``strength.coft`` says."""
    if layer.kind == "matrix":
        return spectrum_of(layer).planes.double()
    limit = multiplier(layer, replace(strength or Strength(), value=1.0), "cpu").expand(layer.stages, layer.stored)
    return transform(layer.kind, layer.terms).angle(lam_of(layer) * limit.unsqueeze(-1))


def layer_reach(layer: LayerRotation, strength: Strength) -> float:
    """Largest angle in radians of any plane at a strength (mode rotation or geodesic), limits applied."""
    s = abs(strength.value)
    if layer.kind == "matrix":
        top = s * float(spectrum_of(layer).planes.max())
        return min(top, torch.pi * strength.coft / 180) if isinstance(strength.coft, float) else top
    angle, lam = transform(layer.kind, layer.terms).angle, largest_lam(layer) * multiplier(layer, strength, "cpu")
    return float((s * angle(lam) if strength.mode == "geodesic" else angle(s * lam)).max())


def layer_error(layer: LayerRotation) -> float:
    """max |M^T M - I| over all blocks at strength 1. Cached."""
    if "error" not in layer._cache:
        layer._cache["error"] = float(orthogonality_error(layer.build(Strength()).matrices.double()).max())
    return layer._cache["error"]


class _Blocks:
    """All stored blocks of layers that are alike, in the layers' order: rows of numbers, kept where they are unless they are few."""

    def __init__(self, rotations: Sequence[LayerRotation], members: Sequence[int], parts: Sequence[Tensor]) -> None:
        first = rotations[members[0]]
        self.ops, self.members, self.block = [rotations[i] for i in members], np.array(members), first.block
        sizes = np.array([len(p) for p in parts])
        #: first block of each layer
        self.starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.sizes = sizes
        self._chunks: list[Tensor] = []
        few = max(1, _PART // 4 // self.block**2)
        waiting: list[Tensor] = []
        room = few
        for p in [*parts, None]:
            if waiting and (p is None or len(p) > room):
                self._chunks.append(waiting[0] if len(waiting) == 1 else torch.cat(waiting))
                waiting, room = [], few
            if p is not None:
                waiting.append(p)
                room -= len(p)
        self._at = np.concatenate([[0], np.cumsum([len(c) for c in self._chunks])])

    def __len__(self) -> int:
        return int(self._at[-1])

    def rows(self, index: np.ndarray) -> Tensor:
        """The numbers of some blocks (k, ...), ascending indices."""
        where = np.searchsorted(self._at, index, side="right") - 1
        cuts = np.flatnonzero(np.diff(where)) + 1
        out = []
        for part in np.split(index, cuts):
            c = int(np.searchsorted(self._at, part[0], side="right")) - 1
            chunk, local = self._chunks[c], part - self._at[c]
            whole = local[-1] - local[0] + 1 == len(local)
            out.append(chunk[local[0] : local[-1] + 1] if whole else chunk[torch.from_numpy(local)])
        return out[0] if len(out) == 1 else torch.cat(out)

    def portions(self, index: np.ndarray) -> Iterator[np.ndarray]:
        """Ascending indices in parts whose matrices stay in a CPU's cache."""
        step = max(1, _PART // self.block**2)
        return (index[i : i + step] for i in range(0, len(index), step))

    def per_block(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """One value a layer -> one a block."""
        return np.repeat(np.array(values, dtype=np.float64), self.sizes)


class _Generators(_Blocks):
    """Blocks that are stored as generators, with bounds low <= lam <= high of the largest lam of each that narrow as needed."""

    def __init__(self, rotations: Sequence[LayerRotation], members: Sequence[int]) -> None:
        super().__init__(rotations, members, [rotations[i].generator.flatten(0, 1) for i in members])
        self.kind, self.terms = self.ops[0].kind, self.ops[0].terms if self.ops[0].kind.startswith("neumann") else 0
        self.transform = transform(self.kind, self.ops[0].terms)
        norms = [torch.linalg.vector_norm(c, dim=1, dtype=torch.float64) for c in self._chunks]
        self.norm = torch.cat(norms).numpy()
        self.high = self.norm * (1 + 1e-9)
        self.low = self.norm / math.sqrt(max(1, self.block // 2)) * (1 - 1e-9)  # all planes alike
        self.narrow = np.zeros(len(self), dtype=bool)
        self.known = np.zeros(len(self), dtype=bool)

    def limits(self, strength: Strength, held: float) -> tuple[np.ndarray, np.ndarray]:
        """Multiplier of every block's generator, and the largest lam that is left of it, as ``strength.coft`` says.

        held: the strength at which the limit holds. A limit in degrees is left to the caller.
        """
        free = np.full(len(self), math.inf)
        if strength.mode == "core":
            return self.per_block([float(core_constraint(op).factor(held)) for op in self.ops]), free
        scale = np.ones(len(self))
        if strength.coft == "off":
            return scale, free
        # A file has one limit a layer or one a block; those of all layers are computed together.
        for smooth in (False, True):
            limited = [i for i, op in enumerate(self.ops) if op.constraint is not None and op.constraint.smooth == smooth]
            one = [i for i in limited if not self.ops[i].constraint.norm.ndim]
            norms = torch.tensor([float(self.ops[i].constraint.norm) for i in one], dtype=torch.float64)
            limits = torch.tensor([self.ops[i].constraint.limit for i in one], dtype=torch.float64)
            factors = np.ones(len(self.ops))
            factors[one] = limit_factor(norms * held, limits, smooth).numpy()
            scale *= self.per_block(factors)
            for i in sorted(set(limited) - set(one)):
                op, start = self.ops[i], self.starts[i]
                scale[start : start + self.sizes[i]] = op.constraint.factor(held).expand(op.stages, op.stored).reshape(-1).numpy()
        return scale, self.per_block([math.inf if op.clip is None else op.clip for op in self.ops])

    def largest(self, scale: np.ndarray, clip: np.ndarray, best: float, rough: bool) -> tuple[float, bool]:
        """Largest min(scale * lam, clip) of all blocks, or ``best`` if none is larger, and whether that is exact (to 1e-6)."""

        def value(lam: np.ndarray) -> np.ndarray:
            return np.minimum(lam * scale, clip)

        best = max(best, float(value(self.low).max()))
        if rough:
            for i in np.argsort(-value(self.norm), kind="stable")[: self._strongest()]:
                nodes, _ = self._planes(np.array([i]))
                best = max(best, float(min(nodes.max() * scale[i], clip[i])))
            return best, False
        self._know(np.argsort(-value(self.high), kind="stable")[:4])
        best = max(best, float(value(self.low).max()))
        self._narrow(np.flatnonzero(value(self.high) > best * (1 + 1e-6)))
        work = 0
        while True:
            best = max(best, float(value(self.low).max()))
            open_ = np.flatnonzero(~self.known & (value(self.high) > best * (1 + 1e-6)))
            if not len(open_) or work > TOP_WORK:
                return best, not len(open_)
            take = open_[np.argsort(-value(self.high)[open_], kind="stable")[:_BATCH]]
            self._know(take)
            work += len(take) * _work(self.block)

    def beyond_one(self, scale: np.ndarray, clip: np.ndarray, rough: bool) -> list[int]:
        """Indices of the layers that have a min(scale * lam, clip) of 1 or more."""
        if not rough:
            self._narrow(np.flatnonzero(np.minimum(self.high * scale, clip) >= 1))
            open_ = np.flatnonzero((np.minimum(self.high * scale, clip) >= 1) & (np.minimum(self.low * scale, clip) < 1))
            for part in np.split(open_, range(_BATCH, len(open_), _BATCH))[: TOP_WORK // (_BATCH * _work(self.block)) + 1]:
                self._know(part)
        # Where nothing more is known, the middle of the bounds decides.
        lam = np.sqrt(self.low * self.high)
        beyond = np.maximum.reduceat(np.minimum(lam * scale, clip), self.starts) >= 1
        return [int(i) for i in self.members[beyond]]

    def mean(self, scale: np.ndarray, cap: np.ndarray, rough: bool) -> tuple[float, bool]:
        """Mean angle of all planes, and whether every plane was looked at.

        Of many blocks a sample spread evenly over their sizes is decomposed; the mean is that of the angles of all blocks' root mean
        square lam, times the sample's quotient of the two.
        """
        count = max(2, MEAN_WORK // _work(self.block))
        complete = not rough and count >= len(self)
        by_norm = self.transform.angle(torch.from_numpy(self.norm * math.sqrt(2 / self.block) * scale)).numpy()
        index = np.arange(len(self))
        if not complete:
            count = min(len(self), self._strongest() if rough else count)
            spread = ((np.arange(count) + 0.5) * len(self) / count).astype(int)
            index = np.sort(np.argsort(by_norm, kind="stable")[spread])
        total = 0.0
        for part in self.portions(index):
            lam, weights = self._planes(part)
            lam = torch.from_numpy(lam * scale[part, None])
            lam *= (torch.from_numpy(cap[part, None]) / lam.amax(1, keepdim=True).clamp_min(1e-300)).clamp_max(1)
            total += float((self.transform.angle(lam).numpy() * weights).sum())
        if complete:
            return total / len(self), True
        rest = float(by_norm[index].sum())
        return (total / rest * float(by_norm.mean()) if rest else 0.0), False

    def reach(self, lam: float, strength: Strength, rough: bool) -> float:
        """Largest angle at a strength; lam: the largest at strength 1."""
        s, power = abs(strength.value), strength.mode == "geodesic"
        if strength.coft == "hold" and (not power or self.kind == "expm"):
            scale, clip = self.limits(strength, s)
            return _angle(self.transform, self.largest(scale * s, clip, 0.0, rough)[0])
        if not power:
            return _angle(self.transform, s * lam)
        if strength.coft != "hold" or all(op.constraint is None and op.clip is None for op in self.ops):
            return s * _angle(self.transform, lam)
        free = s * self.transform.angle(torch.from_numpy(np.maximum.reduceat(self.high, self.starts))).numpy()
        # A limit on the generator of a power needs all planes of a layer, which building it needs as well, and keeps.
        reach = 0.0
        for i in np.argsort(-free, kind="stable"):
            if free[i] > reach:
                reach = max(reach, self.ops[i].reach(strength))
        return reach

    def _strongest(self) -> int:
        return max(1, min(len(self), _STRONGEST, MEAN_WORK * 10 // min(self.block, _DECOMPOSED) ** 3))

    def _narrow(self, index: np.ndarray) -> None:
        def work(parts: Iterator[np.ndarray]) -> None:
            for part in parts:
                low, high = (t.numpy() for t in lambda_bounds(self.rows(part), self.block))
                self.low[part], self.high[part] = np.maximum(self.low[part], low), np.minimum(self.high[part], high)
                self.narrow[part] = True

        spread(work, list(self.portions(index[~self.narrow[index]])))

    def _know(self, index: np.ndarray) -> None:
        index = np.sort(index[~self.known[index]])
        for part in self.portions(index):
            lam = lambdas(unpack_skew(self.rows(part).double(), self.block))[:, -1].numpy()
            self.low[part] = self.high[part] = lam
            self.known[part] = True

    def _planes(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """lam of the planes of some blocks (k, m), and their shares (k, m) or 1 / m: all, or of large blocks the Lanczos nodes."""
        packed = self.rows(index)
        if self.block <= _DECOMPOSED or len(self) * self.block**3 <= EXACT_WORK:
            return lambdas(unpack_skew(packed.double(), self.block)).numpy(), np.array(1 / self.block)
        found = [_lanczos(unpack_skew(v, self.block)) for v in packed]
        return np.stack([lam for lam, _ in found]), np.stack([share for _, share in found])


class _Finished(_Blocks):
    """Blocks that are stored as finished matrices."""

    def __init__(self, rotations: Sequence[LayerRotation], members: Sequence[int]) -> None:
        super().__init__(rotations, members, [rotations[i].matrix.flatten(0, 1) for i in members])

    def measure(self) -> Measures:
        """All of them if they are few, else the strongest and an even sample; the error is that of all but of huge files."""
        every = len(self) * _work(self.block) <= MEAN_WORK
        everything = np.arange(len(self))
        error, size = 0.0, np.zeros(len(self))
        heavy = len(self) * self.block**3 > EXACT_WORK
        eye = torch.eye(self.block)
        for part in self.portions(everything):
            m = self.rows(part)
            size[part] = torch.linalg.vector_norm(m - eye, dim=(1, 2)).numpy()
            if not heavy:
                error = max(error, float(orthogonality_error(m.double()).max()))
        if every:
            angles = torch.cat([op.angles().flatten() for op in self.ops])
            return Measures(float(angles.max()), float(angles.mean()), error=error)
        count = max(1, min(len(self), MEAN_WORK // 4 // _work(self.block)))
        spread = ((np.arange(count) + 0.5) * len(self) / count).astype(int)
        strongest = np.argsort(-size, kind="stable")[: min(count, _STRONGEST)]
        if heavy:
            error = max(float(orthogonality_error(self.rows(np.array([i])).double()).max()) for i in strongest)
        return Measures(float(self._angles(np.sort(strongest)).max()), float(self._angles(spread).mean()), True, True, error)

    def _angles(self, index: np.ndarray) -> Tensor:
        """Angles of the planes of some blocks; each layer says for itself whether row factors are in its matrices."""
        layer = np.searchsorted(self.starts, index, side="right") - 1
        angles = []
        for part in np.split(index, np.flatnonzero(np.diff(layer)) + 1):
            op = self.ops[int(np.searchsorted(self.starts, part[0], side="right")) - 1]
            angles.append(replace(op, matrix=self.rows(part).unsqueeze(0), _cache={}).angles().flatten())
        return torch.cat(angles)


def _work(block: int) -> int:
    """Measure of decomposing one block; small ones cost what calling costs."""
    return max(block, 16) ** 3


def _angle(kind, lam: float) -> float:
    return float(kind.angle(torch.tensor(lam, dtype=torch.float64)))


def _series_error(kind: str, terms: int, top: float) -> float:
    """Upper bound of the entries of |M^T M - I| where all lam <= top: the largest |gain^2 - 1|, and rounding."""
    if not kind.startswith("neumann"):
        return ROUNDING
    gain = transform(kind, terms).plane(torch.linspace(0, top, 4097, dtype=torch.float64))[0]
    return float((gain.square() - 1).abs().max() + ROUNDING * gain.max().square())


def _lanczos(q: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """lam (m,) and shares (m,) of a skew block (b, b) float32 as a Gauss quadrature of its planes, by Lanczos steps on q^T q."""
    size = q.shape[0]
    steps = min(_STEPS, size)
    # Any start will do that is not at right angles to a plane; the same one every time.
    v = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    basis = [v / v.norm()]
    diagonal, beside = [], []
    for _ in range(steps):
        w = -(q @ (q @ basis[-1]))
        diagonal.append(float(w @ basis[-1]))
        known = torch.stack(basis)
        for _ in range(2):
            w = w - known.T @ (known @ w)
        norm = float(w.norm())
        if norm <= 1e-6 * max(diagonal[0], 1e-30):
            break
        beside.append(norm)
        basis.append(w / norm)
    beside = beside[: len(diagonal) - 1]
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    lam, share = np.zeros(steps), np.zeros(steps)
    lam[: len(values)], share[: len(values)] = np.sqrt(np.maximum(values, 0)), vectors[0] ** 2
    return lam, share
