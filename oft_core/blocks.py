"""Multiply a weight or activations by block-diagonal (or butterfly) matrices, in place, block by block.

No full-size delta and no full-size copy is made: the largest temporaries are two pieces of ``piece_size`` float32 numbers a thread, or,
for butterfly products, slabs of whole vectors of that size. One rounding to the weight's dtype at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .threads import spread


def butterfly_permutation(family: str, stage: int, block: int, size: int, device: torch.device | str = "cpu") -> Tensor | None:
    """Index (size,) that gathers the entries of one butterfly stage into consecutive blocks; None for the identity.

    Stage i of both families pairs entries that lie ``block * 2^i / 2`` apart. ``lycoris`` interleaves the two halves entry by entry,
    ``peft`` (BOFT, Liu et al. 2023, arXiv 2311.06243) in chunks of block/2.
    """
    index = torch.arange(size, device=device)
    half = block // 2
    if family == "lycoris":
        return index.view(-1, 2, 2**stage * half).transpose(1, 2).reshape(-1)
    if stage == 0:
        return None
    return index.view(-1, 2, 2**stage, half).transpose(1, 2).reshape(-1)


def row_norms(weight: Tensor) -> Tensor:
    """Euclidean norm of each row of the flattened weight (out, ...) -> (out,) float32, computed chunk by chunk."""
    flat = weight.reshape(weight.shape[0], -1)
    step = max(1, chunk_size(weight.device) // max(1, flat.shape[1]))
    return torch.cat([part.float().norm(dim=1) for part in flat.split(step)])


def transform_(
    weight: Tensor,
    stages: list[Tensor],
    *,
    side: str,
    count: int,
    permutations: list[Tensor | None] | None = None,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    mix: float | None = None,
    inverse: bool = False,
    memory_view: bool = False,
) -> None:
    """weight <- rows * (M weight) * cols in place, M acting on the vectors along one axis of the flattened weight.

    weight: (out, ...) of any floating dtype.   stages: float32 (count or 1, b, b) each, in acting order; one block stands for all.
    side: ``out`` (rows) or ``in`` (columns).   permutations: one gather index or None per stage.   rows (out,), cols (in*...,): factors.
    mix: m for weight + m (result - weight).   inverse: factors act before M instead of after it.
    memory_view: read the memory as (numel/out, out), see ``LayerRotation``.
    """
    shape = (weight.numel() // weight.shape[0], weight.shape[0]) if memory_view else (weight.shape[0], -1)
    if not weight.is_contiguous():
        copy = weight.contiguous()
        _transform_flat(copy.view(shape), stages, side, count, permutations, rows, cols, mix, inverse)
        weight.copy_(copy)
        return
    _transform_flat(weight.view(shape), stages, side, count, permutations, rows, cols, mix, inverse)


def turn_subspace_(weight: Tensor, m: Tensor, basis: Tensor, *, side: str, mix: float | None = None) -> None:
    """weight <- M weight (``out``) or weight M^T (``in``) in place, M = 1 + mix V (m - 1) V^T; chunk by chunk, one rounding.

    weight: (out, ...) of any floating dtype.   m: (k, k) float32.   basis: V (axis, k) float32, orthonormal columns.   mix: 1 if None.
    """
    if not weight.is_contiguous():
        copy = weight.contiguous()
        turn_subspace_(copy, m, basis, side=side, mix=mix)
        weight.copy_(copy)
        return
    flat = weight.view(weight.shape[0], -1)
    flat = flat.t() if side == "out" else flat
    change = m - torch.eye(len(m), dtype=m.dtype, device=m.device)
    right = (change if mix is None else change * mix).t() @ basis.t()
    for part in flat.split(max(1, chunk_size(weight.device) // max(1, flat.shape[1]))):
        source = part.float()
        store_(part, torch.addmm(source, source @ basis, right))


def store_(part: Tensor, value: Tensor) -> None:
    """part <- value with one rounding; 8-bit floats saturate instead of turning into NaN."""
    if part.dtype.itemsize == 1:
        top = torch.finfo(part.dtype).max
        value = value.float().clamp(-top, top)
    part.copy_(value)


def _transform_flat(
    flat: Tensor, stages: list[Tensor], side: str, count: int, permutations: list[Tensor | None] | None,
    rows: Tensor | None, cols: Tensor | None, mix: float | None, inverse: bool,
) -> None:
    plain = len(stages) == 1 and (permutations is None or permutations[0] is None)
    along, across = (rows, cols) if side == "out" else (cols, rows)
    if not plain or across is not None and (mix is not None or side == "out"):
        _general_(flat, stages, side, count, permutations, rows, cols, mix, inverse)
        return
    m = fold(stages[0], along, mix, inverse, count)
    b = m.shape[-1]
    size = flat.shape[0] if side == "out" else flat.shape[1]
    whole = size // b * b
    if whole:
        part = m[: whole // b] if m.shape[0] > 1 else m
        if side == "out":
            _rows_(flat[:whole], part)
        else:
            _columns_(flat[:, :whole], part, across)
    if whole < size:
        # A block count that does not divide the size: the last block is cut, as PEFT up to 0.13 does.
        cut = m[-1:, : size - whole, : size - whole]
        if side == "out":
            _rows_(flat[whole:], cut)
        else:
            _columns_(flat[:, whole:], cut, across)


def fold(m: Tensor, factors: Tensor | None, mix: float | None, inverse: bool, count: int) -> Tensor:
    """Put the factors of the rotated axis and the mixing into the blocks themselves: (n, b, b) float32."""
    b = m.shape[-1]
    if factors is not None:
        padded = torch.ones(count * b, dtype=m.dtype, device=m.device)
        padded[: factors.numel()] = factors
        grouped = padded.view(count, b)
        m = m * (grouped.unsqueeze(-2) if inverse else grouped.unsqueeze(-1))
    if mix is not None:
        m = torch.lerp(torch.eye(b, dtype=m.dtype, device=m.device).expand_as(m), m, mix)
    return m


def _rows_(flat: Tensor, m: Tensor) -> None:
    """flat (n*b, c) <- blockdiag(m) flat, in place; m (n or 1, b, b)."""
    b, c = m.shape[-1], flat.shape[1]
    n = flat.shape[0] // b
    chunk = piece_size(flat.device)
    width = c if b * c <= chunk else max(16, min(c, chunk // b // 16 * 16))
    group = max(1, min(n, chunk // (b * width)))
    m = m.expand(n, b, b)
    view = flat.unflatten(0, (n, b))

    def work(pieces: Iterator[tuple[int, int]]) -> None:
        out, stage = _buffers(flat, group * b * width)
        for k, j in pieces:
            g, w = min(group, n - k), min(width, c - j)
            part, result = view[k : k + g, :, j : j + w], out[: g * b * w].view(g, b, w)
            source = part if stage is None else stage[: g * b * w].view(g, b, w).copy_(part)
            torch.bmm(m[k : k + g], source, out=result)
            store_(part, result)

    spread(work, [(k, j) for k in range(0, n, group) for j in range(0, c, width)], flat.device)


def _columns_(flat: Tensor, m: Tensor, rows: Tensor | None) -> None:
    """flat (r, n*b) <- rows * flat blockdiag(m)^T, in place; m (n or 1, b, b), rows (r,) or None."""
    b, r = m.shape[-1], flat.shape[0]
    n = flat.shape[1] // b
    chunk = piece_size(flat.device)
    # Enough rows for the GEMM kernel come first: wide layers would otherwise leave ten rows a chunk and halve the speed.
    height = min(r, max(64 if b <= 32 else 128, chunk // (n * b)))
    group = max(1, min(n, chunk // (height * b)))
    mt = m.transpose(-1, -2).contiguous().expand(n, b, b)
    view = flat.unflatten(1, (n, b)).transpose(0, 1)

    def work(pieces: Iterator[tuple[int, int]]) -> None:
        out, stage = _buffers(flat, height * group * b)
        for i, k in pieces:
            h, g = min(height, r - i), min(group, n - k)
            part, result = view[k : k + g, i : i + h], out[: g * h * b].view(g, h, b)
            # The stage keeps the weight's own order, so that both conversions run along memory.
            source = part if stage is None else stage[: g * h * b].view(h, g, b).transpose(0, 1).copy_(part)
            torch.bmm(source, mt[k : k + g], out=result)
            if rows is not None:
                result.mul_(rows[i : i + h].view(1, -1, 1))
            store_(part, result)

    spread(work, [(i, k) for i in range(0, r, height) for k in range(0, n, group)], flat.device)


def piece_size(device: torch.device) -> int:
    """Numbers of float32 that one thread works on: 512 KiB on a CPU, so that it stays in a core's cache; 64 MiB elsewhere, to save
    kernel launches."""
    return 1 << 17 if device.type == "cpu" else 1 << 24


def chunk_size(device: torch.device) -> int:
    """Numbers in one float32 chunk of an operation that torch divides among its threads: a piece for each, of up to four."""
    return piece_size(device) * (min(torch.get_num_threads(), 4) if device.type == "cpu" else 1)


def _buffers(weight: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """A float32 result buffer, and one for the source if the weight is not float32 itself."""
    out = torch.empty(size, dtype=torch.float32, device=weight.device)
    return out, None if weight.dtype == torch.float32 else torch.empty_like(out)


def _general_(
    flat: Tensor, stages: list[Tensor], side: str, count: int, permutations: list[Tensor | None] | None,
    rows: Tensor | None, cols: Tensor | None, mix: float | None, inverse: bool,
) -> None:
    """Any number of stages with permutations and factors: whole vectors of the rotated axis, a slab at a time."""
    axis = 0 if side == "out" else 1
    size, other = flat.shape[axis], flat.shape[1 - axis]
    step = max(1, piece_size(flat.device) // size)

    def work(starts: Iterator[int]) -> None:
        for i in starts:
            part = flat.narrow(1 - axis, i, min(step, other - i))
            source = part.float()
            work = _scaled(source, rows, cols, axis, i) if inverse else source
            work = work if axis == 0 else work.t()
            for k, m in enumerate(stages):
                index = None if permutations is None else permutations[k]
                work = rotate(work, m, index)
            work = work if axis == 0 else work.t()
            if not inverse:
                work = _scaled(work, rows, cols, axis, i)
            store_(part, work if mix is None else torch.lerp(source, work, mix))

    spread(work, range(0, other, step), flat.device)


def _scaled(x: Tensor, rows: Tensor | None, cols: Tensor | None, axis: int, start: int) -> Tensor:
    """x times the row and column factors; the slab starts at ``start`` on the axis that is not rotated."""
    if rows is not None:
        part = rows if axis == 0 else rows[start : start + x.shape[0]]
        x = x * part.unsqueeze(1)
    if cols is not None:
        part = cols if axis == 1 else cols[start : start + x.shape[1]]
        x = x * part.unsqueeze(0)
    return x


def rotate(x: Tensor, m: Tensor, index: Tensor | None = None) -> Tensor:
    """x (size, c) float32 -> blockdiag(m) x, gathered into blocks by ``index`` first and scattered back; m (n or 1, b, b)."""
    b = m.shape[-1]
    gathered = x if index is None else x[index]
    blocks = gathered.reshape(-1, b, x.shape[1])
    turned = (m @ blocks).reshape(x.shape)
    if index is None:
        return turned
    out = torch.empty_like(turned)
    out[index] = turned
    return out
