"""Apply rotations to what goes into a layer and comes out of it, instead of to its weight.

A changed weight B (W + D) A^T gives B (W (A^T x) + D (A^T x)): A^T turns the input, B the output without its bias, and W stays as
it is stored. For quantised weights that is exact where a rotated weight would have to be rounded again (input side: OFTv2, Qiu et
al. 2025, arXiv 2506.19847).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import blocks as multiply
from .constraint import Strength
from .errors import ShapeError
from .layer import Built, Diff, Factors, LayerRotation
from .tensors import moved

# -------------------------------------------------------------------- maps of one axis


@dataclass(frozen=True)
class Blocks:
    """Multiplication by blockdiag(m), m (n or 1, b, b) float32, after gathering by ``index`` (size,); the last block may be cut."""

    m: Tensor
    index: Tensor | None = None

    def __call__(self, x: Tensor, transpose: bool) -> Tensor:
        """x (t, size) with vectors as rows."""
        if self.index is not None:
            x = x[:, self.index]
        b, size = self.m.shape[-1], x.shape[1]
        right = self.m.to(x.dtype)
        right = right if transpose else right.transpose(-1, -2)
        whole = size // b * b
        parts = []
        if whole:
            parts.append(_times(x[:, :whole], right if len(right) == 1 else right[: whole // b]))
        if whole < size:
            parts.append(x[:, whole:] @ right[-1, : size - whole, : size - whole])
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if self.index is None else y[:, torch.argsort(self.index)]


@dataclass(frozen=True)
class Subspace:
    """Multiplication by 1 + V (m - 1) V^T, m (k, k) and V (size, k) float32."""

    m: Tensor
    basis: Tensor

    def __call__(self, x: Tensor, transpose: bool) -> Tensor:
        """x (t, size) with vectors as rows."""
        change = self.m.to(x.dtype) - torch.eye(len(self.m), dtype=x.dtype, device=x.device)
        basis = self.basis.to(x.dtype)
        return torch.addmm(x, x @ basis @ (change if transpose else change.t()), basis.t())


def _times(x: Tensor, right: Tensor) -> Tensor:
    """x (t, n*b) times blockdiag(right), right (n or 1, b, b)."""
    b = right.shape[-1]
    if len(right) == 1:
        return (x.reshape(-1, b) @ right[0]).view(x.shape)
    runs = x.unflatten(1, (len(right), b)).transpose(0, 1)
    return torch.bmm(runs, right).transpose(0, 1).reshape(x.shape)


@dataclass(frozen=True, eq=False)
class AxisMap:
    """A linear map A of the vectors along one axis: its steps in acting order (blocks, or factors (size,)), mixed with 1."""

    steps: tuple[Blocks | Subspace | Tensor, ...]
    mix: float | None = None

    def __call__(self, x: Tensor, transpose: bool = False) -> Tensor:
        """Rows of x (t, size), float32 or float64: x -> A x, or A^T x."""
        y = x
        for step in reversed(self.steps) if transpose else self.steps:
            y = y * step.to(y.dtype) if isinstance(step, Tensor) else step(y, transpose)
        return y if self.mix is None else torch.lerp(x, y, self.mix)

    @property
    def local(self) -> bool:
        """Whether every entry depends on the same entry only."""
        return all(isinstance(step, Tensor) for step in self.steps)


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a changed weight: B (gain * W + delta_gain * D) A^T, with A ``inward``, B ``outward``, D ``delta``."""

    gain: float = 1.0
    inward: AxisMap | None = None
    outward: AxisMap | None = None
    delta: Tensor | None = None
    delta_gain: float = 1.0


def terms_of(
    op: LayerRotation | Diff, strength: Strength, built: Built | None, measured: Tensor | None, device: torch.device | str
) -> list[Term]:
    """What ``op.apply_`` does to a weight (out, in), as a sum of terms on ``device``.

    built: what ``op.build`` gave for the same strength. measured: what ``op.measure`` gave; norms of ``norm_of`` current of the arriving
    weight with ``arriving_delta`` added. Raises ShapeError for rotations of the weight's memory, which are no maps of activations.
    """
    s = strength.value
    if s == 0:
        return [Term()]
    if isinstance(op, Diff):
        delta = moved(op.delta, device, torch.float32).flatten(1)
        return [Term(1 - s if op.whole else 1.0, delta=delta, delta_gain=s)]
    if op.memory_view:
        raise ShapeError("A rotation of the weight's memory is not one of activations")
    delta, gain = arriving_delta(op, strength)
    straight = strength.mode == "linear" and delta is not None
    f = op.factors(built, measured, Strength() if straight else strength, device)
    along, across = (f.rows, f.cols) if op.side == "out" else (f.cols, f.rows)
    turn = _axis_map(f, along, f.mix if across is None else None)
    scale = None if across is None else AxisMap((across,))
    inward, outward = (scale, turn) if op.side == "out" else (turn, scale)
    if delta is not None:
        delta = moved(delta, device, torch.float32).flatten(1)
        share = strength.value if straight else 1.0
        terms = [Term(share, inward, outward, delta, share * gain)]
        return terms if share == 1 else [Term(1 - share), *terms]
    if f.mix is not None and across is not None:
        return [Term(1 - f.mix), Term(f.mix, inward, outward)]
    return [Term(1.0, inward, outward)]


def _axis_map(f: Factors, along: Tensor | None, mix: float | None) -> AxisMap:
    """The rotation, factors of the same axis and mixing as one map; a single stage takes the others into its blocks."""
    if f.basis is not None:
        return AxisMap((Subspace(f.stages[0][0], f.basis),), mix)
    index = f.permutations or [None] * len(f.stages)
    if len(f.stages) == 1 and index[0] is None:
        return AxisMap((Blocks(multiply.fold(f.stages[0], along, mix, f.inverse, f.count)),))
    stages = tuple(Blocks(m, i) for m, i in zip(f.stages, index, strict=True))
    if along is None:
        return AxisMap(stages, mix)
    return AxisMap((along, *stages) if f.inverse else (*stages, along), mix)


def arriving_delta(op: LayerRotation | Diff, strength: Strength) -> tuple[Tensor | None, float]:
    """The difference that DoKr-OFT adds before it rotates, and how much of it; (None, 0) without one."""
    if isinstance(op, Diff) or op.added is None:
        return None, 0.0
    return op.added, 1.0 if strength.mode == "linear" else strength.value


# -------------------------------------------------------------------- several changes of one layer


@dataclass(frozen=True)
class Change:
    """One change of the rows start ... stop of a weight; swap: in the change's own order these rows' halves are exchanged."""

    start: int
    stop: int
    terms: Sequence[Term]
    swap: bool = False


@dataclass(eq=False)
class _Leaf:
    """The unchanged layer (or one difference) times one of the turned inputs."""

    source: int


@dataclass(eq=False)
class _Changed:
    change: Change
    before: _Leaf | _Changed | None
    #: term -> what it starts from, and the source of its difference
    parts: list[tuple[Term, _Leaf | _Changed | None, int | None]] = field(default_factory=list)


class Pipeline:
    """Changes of one layer, in order, as turned inputs and maps of the outputs.

    The unchanged layer is called once, on all turned inputs that are needed: one, except where a change of the input side concerns
    only some rows (a fused layer) or has to be mixed with the unchanged result. rows: the layer's outputs.
    """

    def __init__(self, changes: Sequence[Change], rows: int):
        self.changes, self.rows = tuple(changes), rows
        self._chains: list[tuple[AxisMap, ...]] = []
        self._sources: list[tuple[int, Tensor | None]] = []
        self._known: dict[tuple, _Leaf | _Changed] = {}
        cuts = sorted({0, rows, *(c.start for c in changes), *(c.stop for c in changes)})
        self._segments = [
            frozenset(i for i, (a, b) in enumerate(itertools.pairwise(cuts)) if c.start <= a and b <= c.stop)
            for c in self.changes
        ]
        self._root = self._node(len(self.changes), (), frozenset(range(len(cuts) - 1)))
        if all(delta is not None for _, delta in self._sources):
            self._source((), None)  # the output's dtype and shape come from the layer

    # ---------------------------------------------------------------- planning

    def _source(self, chain: tuple[AxisMap, ...], delta: Tensor | None) -> int:
        if chain not in self._chains:
            self._chains.append(chain)
        at = self._chains.index(chain)
        for i, (j, known) in enumerate(self._sources):
            if j == at and known is delta:
                return i
        self._sources.append((at, delta))
        return len(self._sources) - 1

    def _node(self, k: int, chain: tuple[AxisMap, ...], need: frozenset[int]) -> _Leaf | _Changed:
        """The first k changes on the input that ``chain`` turns, right in the segments of rows ``need``."""
        key = (k, chain, need)
        if key not in self._known:
            self._known[key] = self._new_node(k, chain, need)
        return self._known[key]

    def _new_node(self, k: int, chain: tuple[AxisMap, ...], need: frozenset[int]) -> _Leaf | _Changed:
        if k == 0:
            return _Leaf(self._source(chain, None))
        change, mine = self.changes[k - 1], self._segments[k - 1]
        inside, outside = need & mine, need - mine
        if not inside:
            return self._node(k - 1, chain, need)
        wants = [
            mine if change.swap or (t.outward is not None and not t.outward.local) else inside for t in change.terms
        ]
        # What is not changed and what starts from the same input are computed together.
        shared = outside.union(*(w for w, t in zip(wants, change.terms, strict=True) if t.inward is None and t.gain != 0))
        node = _Changed(change, self._node(k - 1, chain, shared) if outside else None)
        for want, term in zip(wants, change.terms, strict=True):
            inner = chain if term.inward is None else (*chain, term.inward)
            start = None
            if term.gain != 0:
                start = self._node(k - 1, inner, shared if term.inward is None else want)
            delta = None if term.delta is None or term.delta_gain == 0 else self._source(inner, term.delta)
            node.parts.append((term, start, delta))
        return node

    # ---------------------------------------------------------------- running

    def __call__(self, x: Tensor, layer: Callable[[Tensor], Tensor], bias: Callable[[Tensor], Tensor | None], axis: int) -> Tensor:
        """The changed layer's output for x (batch, ...), vectors along ``axis`` (-1, or 1 for images).

        layer: the unchanged one, bias included. bias: its bias (out,) or None, given an output. Float32 or better inside; one
        rounding of the input and one of the output to their dtypes.
        """
        turned = [self._turned(x, chain, axis) for chain in self._chains]
        wanted = [i for i, (_, delta) in enumerate(self._sources) if delta is None]
        inputs = [turned[self._sources[i][0]] for i in wanted]
        done = layer(inputs[0] if len(inputs) == 1 else torch.cat(inputs))
        outputs = dict(zip(wanted, done.chunk(len(wanted)), strict=True))
        if isinstance(self._root, _Leaf):
            return outputs[self._root.source]
        dtype = torch.promote_types(done.dtype, torch.float32)
        b = bias(done)
        b = None if b is None else b.to(done.device, dtype)
        sources = [
            (outputs[i], None) if delta is None else (turned[at], delta.to(dtype)) for i, (at, delta) in enumerate(self._sources)
        ]

        def finish(*parts: Tensor) -> Tensor:
            values = []
            for part, (_, delta) in zip(parts, sources, strict=True):
                part = part.to(dtype)
                values.append(part @ delta.t() if delta is not None else part if b is None else part - b)
            y = self._value(self._root, values, {})
            return y if b is None else y + b

        return _in_parts(finish, [t for t, _ in sources], outputs[wanted[0]], self.rows, axis)

    @staticmethod
    def _turned(x: Tensor, chain: tuple[AxisMap, ...], axis: int) -> Tensor:
        if not chain:
            return x
        dtype = torch.promote_types(x.dtype, torch.float32)

        def turn(part: Tensor) -> Tensor:
            part = part.to(dtype)
            for one in chain:
                part = one(part, transpose=True)
            return part

        return _in_parts(turn, [x], x, x.shape[axis], axis)

    def _value(self, node: _Leaf | _Changed, values: list[Tensor], memo: dict[int, Tensor]) -> Tensor:
        """A node for one part of the tokens: (t, rows)."""
        if isinstance(node, _Leaf):
            return values[node.source]
        if id(node) not in memo:
            memo[id(node)] = self._changed_value(node, values, memo)
        return memo[id(node)]

    def _changed_value(self, node: _Changed, values: list[Tensor], memo: dict[int, Tensor]) -> Tensor:
        c = node.change
        total = None
        for term, start, delta in node.parts:
            part = None
            if start is not None:
                part = self._value(start, values, memo)[:, c.start : c.stop]
                part = part if term.gain == 1 else part * term.gain
                part = _exchanged(part) if c.swap else part
            if delta is not None:
                extra = values[delta] * term.delta_gain
                part = extra if part is None else part + extra
            if part is None:
                continue
            if term.outward is not None:
                part = term.outward(part)
            total = part if total is None else total + part
        total = _exchanged(total) if c.swap else total
        if c.stop - c.start == self.rows:
            return total
        if node.before is None:
            return torch.nn.functional.pad(total, (c.start, self.rows - c.stop))
        around = self._value(node.before, values, memo)
        return torch.cat([around[:, : c.start], total, around[:, c.stop :]], 1)


def _exchanged(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return torch.cat([x[:, half:], x[:, :half]], 1)


def map_vectors(x: Tensor, terms: Sequence[Term]) -> Tensor:
    """Rows of a changed table: for an embedding's weight W' = W A^T the vectors x (..., size) it gives become A x.

    Raises ShapeError for changes that are not maps of these vectors.
    """
    if any(t.outward is not None or t.delta is not None for t in terms):
        raise ShapeError("Only the vectors of an embedding can be turned, not its rows")
    dtype = torch.promote_types(x.dtype, torch.float32)

    def change(part: Tensor) -> Tensor:
        part = part.to(dtype)
        return sum(t.gain * (part if t.inward is None else t.inward(part)) for t in terms)

    return _in_parts(change, [x], x, x.shape[-1], -1)


def _in_parts(f: Callable[..., Tensor], inputs: Sequence[Tensor], like: Tensor, width: int, axis: int) -> Tensor:
    """f on (t, size) parts of all inputs, a bounded number of tokens at a time; vectors of length ``width`` along ``axis``.

    The result has the dtype and, but for the axis, the shape of ``like``.
    """
    shape = [*like.shape]
    shape[axis] = width
    views = [_tokens(t, axis) for t in inputs]
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        whole = torch.stack([f(*(v[i] for v in views)) for i in range(len(views[0]))]).to(like.dtype)
        return whole.reshape(shape) if axis == -1 else whole.transpose(1, 2).reshape(shape)
    out = torch.empty(shape, dtype=like.dtype, device=like.device)
    target = _tokens(out, axis)
    step = max(32, multiply.chunk_size(like.device) // max(width, *(v.shape[-1] for v in views)))
    for i in range(target.shape[0]):
        for j in range(0, target.shape[1], step):
            target[i, j : j + step] = f(*(v[i, j : j + step] for v in views))
    return out


def _tokens(x: Tensor, axis: int) -> Tensor:
    """x as (groups, tokens, size), the axis last."""
    return x.reshape(1, -1, x.shape[-1]) if axis == -1 else x.flatten(2).transpose(1, 2)
