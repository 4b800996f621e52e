"""Several adapters as one: rotations averaged in the Lie algebra of the rotations, where order does not matter.

Composing needs nothing of this: the adapters' patches are simply applied one after the other.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapter import Patch
from .constraint import Strength
from .errors import FileError, ShapeError, StackError
from .formats.keys import holds_oft as holds_rotations
from .layer import Diff, LayerRotation
from .rotation import pack_skew
from .tensors import full_precision

#: Largest common block: exponentials of larger ones take minutes over a whole model.
LARGEST_BLOCK = 512
#: Modes in which an adapter at a strength is still a rotation, so that it has a logarithm. They may differ between adapters.
BLENDED_MODES = ("rotation", "geodesic")
#: A finished matrix further from orthogonal than this (max |M^T M - I|) is not taken for a rotation.
NOT_A_ROTATION = 1e-3
_USE_COMPOSE = "Use 'compose', which applies the adapters one after the other."


@dataclass(frozen=True)
class Share:
    """One adapter's change of one parameter, and how strongly it enters. adapter: its name, for messages."""

    patch: Patch
    strength: Strength
    adapter: str


def holds_oft(path: str | os.PathLike) -> bool:
    """Whether a safetensors file has OFT layers, from the names of its tensors alone. Raises FileError for a damaged file."""
    try:
        with safe_open(path, "pt") as f:
            return holds_rotations(f.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError("The file is damaged or not a safetensors file", file=path, found=str(error)) from error


@full_precision()
def blend(shares: Iterable[Share], count: int, shapes: Mapping[str, Sequence[int]], *, keep_angles: bool = False) -> list[Patch]:
    """One set of patches, for strength 1, that stands for the average of ``count`` adapters.

    Per parameter and side: R = exp(1/count * sum of log R_i(s_i)), R_i(s_i) each adapter's own rotation at its strength, limits
    applied; an adapter without the layer counts as no rotation. Input and output side do not meet, so both are averaged by
    themselves. Row factors become their weighted geometric mean, additive differences their weighted mean. Blocks of different
    size are refined to their least common multiple. The order of ``shares`` does not matter beyond rounding. shapes: parameter key
    -> shape, of the parameters concerned.

    keep_angles: rotations in different directions average to a smaller one (two to 1/sqrt 2). Each block's generator is then made as
    long as those of the adapters that have it are on average, at most ``count`` times as long; so two styles keep their force. An
    idea of OrthoFuse (arXiv 2604.05183), which restores the spectrum of the blended rotation.

    Raises StackError for layers that have no such average: mode linear or core, BOFT, cut last blocks, DoRA norms, DoKr-OFT,
    whole parameters, finished matrices that are no rotations, negative or zero row factors, blocks without a common size.
    """
    keys: dict[str, list[Share]] = {}
    for share in shares:
        keys.setdefault(share.patch.key, []).append(share)
    out: list[Patch] = []
    for key, group in keys.items():
        for part in _aligned(group, shapes[key][0]):
            out += _blend_rows(part, count, shapes[key], keep_angles)
    return out


def _aligned(group: list[Share], rows: int) -> list[list[Share]]:
    """Shares of one parameter, cut so that each list covers the same rows: a fused layer may be whole in one file only."""
    spans = [s.patch.rows or (0, rows) for s in group]
    edges = sorted({edge for start, length in spans for edge in (start, start + length)})
    parts: list[list[Share]] = []
    for start, stop in itertools.pairwise(edges):
        part = [
            _cut(share, start - at, stop - start, None if stop - start == rows else (start, stop - start))
            for share, (at, length) in zip(group, spans, strict=True)
            if at <= start and stop <= at + length
        ]
        if part:
            parts.append(part)
    return parts


def _cut(share: Share, start: int, length: int, rows: tuple[int, int] | None) -> Share:
    """The share's change of ``length`` of its own rows from ``start`` on; rows: where they are in the parameter."""
    patch = share.patch
    if rows == patch.rows:
        return share
    if patch.swap_halves:
        raise _refused([share], "its halves are stored in another order")
    try:
        op = patch.op.rows_slice(start, length, module=patch.module)
    except ShapeError as error:
        raise _refused([share], f"its blocks run across the parts of a fused layer ({error.found})") from error
    return replace(share, patch=replace(patch, op=op, rows=rows))


def _blend_rows(part: list[Share], count: int, shape: Sequence[int], keep_angles: bool) -> list[Patch]:
    first = part[0].patch
    if len({s.patch.swap_halves for s in part}) > 1:
        raise _refused(part, "its halves are stored in different orders")
    make = [s for s in part if isinstance(s.patch.op, LayerRotation)]
    ops: list[LayerRotation | Diff] = []
    for side in ("in", "out"):
        here = [s for s in make if s.patch.op.side == side]
        if here:
            ops.append(_average(here, count, keep_angles))
    differences = [s for s in part if isinstance(s.patch.op, Diff)]
    if differences:
        if any(s.patch.op.whole for s in differences):
            raise _refused(differences, "a file stores this parameter whole, not a change of it")
        # Files differ in how they write a 1x1 convolution's difference.
        delta = sum(s.strength.value / count * s.patch.op.delta.double().reshape(-1, *shape[1:]) for s in differences)
        ops.append(Diff(delta.float()))
    return [Patch(first.module, first.key, op, first.component, first.rows, first.swap_halves) for op in ops]


def _average(shares: Sequence[Share], count: int, keep_angles: bool) -> LayerRotation:
    """The average of rotations of one side of one parameter."""
    ops = [s.patch.op for s in shares]
    for share in shares:
        _check(share)
    block = math.lcm(*(op.block for op in ops))
    axis = ops[0].axis
    if any(op.axis != axis for op in ops) or axis % block:
        raise _refused(shares, f"blocks of {_sizes(ops)} have no common size that divides {axis} channels")
    if block > LARGEST_BLOCK:
        raise _refused(shares, f"blocks of {_sizes(ops)} only meet in blocks of {block}, above the limit of {LARGEST_BLOCK}")
    shared = all(op.stored == 1 and op.block == block for op in ops)
    logs = [_refined(s.patch.op.logarithm(s.strength)[0], s.patch.op, block, shared) for s in shares]
    total = sum(logs) / count
    if keep_angles:
        size = sum(log.flatten(-2).norm(dim=-1) for log in logs) / len(logs)
        total = total * (size / total.flatten(-2).norm(dim=-1).clamp_min(1e-12)).clamp_max(count)[..., None, None]
    head = {"side": ops[0].side, "block": block, "count": axis // block, "row_scale": _row_scale(shares, count)}
    if all(op.exact or op.kind == "matrix" for op in ops):  # skew but for rounding
        return LayerRotation(kind="expm", generator=pack_skew(total).float().unsqueeze(0), **head)
    return LayerRotation(kind="matrix", matrix=torch.linalg.matrix_exp(total).float().unsqueeze(0), **head)


def _refined(log: Tensor, op: LayerRotation, block: int, shared: bool) -> Tensor:
    """Blocks (stored, b, b) as blocks of the common size (n, block, block): smaller ones along its diagonal."""
    if shared:
        return log
    b, times = op.block, block // op.block
    log = log.expand(op.count, b, b).reshape(op.count // times, times, b, b)
    wide = log.new_zeros(op.count // times, block, block)
    for i in range(times):
        wide[:, i * b : (i + 1) * b, i * b : (i + 1) * b] = log[:, i]
    return wide


def _row_scale(shares: Sequence[Share], count: int) -> Tensor | None:
    scaled = [s for s in shares if s.patch.op.row_scale is not None]
    if not scaled:
        return None
    logs = [s.strength.value / count * s.patch.op.row_scale.double().log() for s in scaled]
    return sum(logs).exp().float()


def _check(share: Share) -> None:
    """Raises StackError if the rotation has no logarithm block by block, or factors that cannot be averaged."""
    op, mode = share.patch.op, share.strength.mode
    if mode not in BLENDED_MODES:
        hint = f"Give it mode {' or '.join(BLENDED_MODES)}. {_USE_COMPOSE}"
        raise _refused([share], f"mode '{mode}' is no rotation between the base and the file", hint)
    reason = None
    if op.subspace:
        reason = "it turns a subspace of the channels, not blocks of them"
    elif op.butterfly:
        reason = "a BOFT layer turns all channels together, not block by block"
    elif op.size is not None and op.size % op.block:
        reason = "its last block is cut"
    elif op.added is not None:
        reason = "DoKr-OFT adds a difference before it turns"
    elif op.norm_of:
        reason = "DoRA norms depend on the weight they meet"
    elif op.half_turn:
        reason = "it turns by 180 degrees (or reflects), which has no direction"
    elif op.memory_view:
        reason = "it reads the weight's memory in another order"
    elif op.col_scale is not None:
        reason = "it scales columns"
    elif op.row_scale is not None and float(op.row_scale.min()) <= 0:
        reason = "a row factor is not positive"
    elif op.kind == "matrix" and op.orthogonality_error() > NOT_A_ROTATION:
        reason = f"its stored matrix is no rotation (orthogonality error {op.orthogonality_error():.2g})"
    if reason is not None:
        raise _refused([share], reason)


def _sizes(ops: Sequence[LayerRotation]) -> str:
    return " and ".join(map(str, sorted({op.block for op in ops})))


def _refused(shares: Sequence[Share], reason: str, hint: str = _USE_COMPOSE) -> StackError:
    return StackError(
        f"These adapters cannot be blended: {reason}", file=", ".join(dict.fromkeys(s.adapter for s in shares)),
        module=shares[0].patch.module, hint=hint,
    )
