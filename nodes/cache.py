"""Built rotations, kept between forwards.

A partially loaded model asks for each weight again in every forward, so the rotations must not be rebuilt each time;
a full load asks for each of them once. Layers whose blocks have one size are built together, in batches: a few large
tensor operations instead of several small ones per layer.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..oft_core import LayerRotation, Strength, build_all

# Memory for built rotations over all files and devices, in bytes. The batch that was built last always stays.
LIMIT_BYTES = 384 << 20
# Largest batch, in bytes of built rotations: bounds what a single missing layer can cost.
BATCH_BYTES = 64 << 20

_tokens = itertools.count(1)
_batches: WeakValueDictionary[int, Batch] = WeakValueDictionary()
_built: OrderedDict[tuple, Any] = OrderedDict()
_sizes: dict[tuple, int] = {}
_total = 0
_lock = threading.RLock()


class Batch:
    """Layers whose rotations are built together. Lives as long as a model patcher that uses it (see `host.Keeper`)."""

    __slots__ = ("__weakref__", "ops", "token")

    def __init__(self, ops: Sequence[LayerRotation]):
        self.ops = tuple(ops)
        self.token = next(_tokens)
        _batches[self.token] = self


def batches(ops: Sequence[LayerRotation]) -> list[tuple[Batch, int]]:
    """Group `ops` by block size, in order, into batches of bounded size; gives (batch, place in it) for each op."""
    out: list[tuple[Batch, int] | None] = [None] * len(ops)
    groups: dict[Any, list[int]] = {}
    for i, op in enumerate(ops):
        groups.setdefault(op.block, []).append(i)
    for members in groups.values():
        start, size = 0, 0
        for end, i in enumerate(members):
            cost = built_bytes(ops[i])
            if size and size + cost > BATCH_BYTES:
                _close(ops, members[start:end], out)
                start, size = end, 0
            size += cost
        _close(ops, members[start:], out)
    return out


def _close(ops: Sequence[Any], members: list[int], out: list) -> None:
    batch = Batch([ops[i] for i in members])
    for place, i in enumerate(members):
        out[i] = (batch, place)


def rotation(token: int, place: int, strength: Strength, device: torch.device, spare: LayerRotation) -> Any:
    """The built rotation of one layer: from the cache, or by building its whole batch.

    token, place: what `batches` gave. spare: the layer itself, built alone if the batch is gone because nothing but a
    hook's weights refers to the file any more.
    """
    key = (token, place, strength, str(device))
    with _lock:
        if key in _built:
            _built.move_to_end(key)
            return _built[key]
        batch = _batches.get(token)
        if batch is None:
            return spare.build(strength, device)
        made = build_all(list(batch.ops), strength, device)
        for i, one in enumerate(made):
            _store((token, i, strength, str(device)), one)
        _trim(keep=len(made))
        return made[place]


def release(tokens: Iterable[int]) -> None:
    """Forget the rotations built for these batches."""
    wanted = set(tokens)
    with _lock:
        for key in [k for k in _built if k[0] in wanted]:
            _drop(key)


def total_bytes() -> int:
    """Memory held by built rotations, in bytes."""
    return _total


def built_bytes(op: LayerRotation) -> int:
    """Bytes that the built rotation of `op` takes (float32 matrices)."""
    return op.stages * op.stored * op.block * op.block * 4


def _store(key: tuple, made: Any) -> None:
    global _total
    if key in _built:
        _drop(key)
    _built[key] = made
    _sizes[key] = 0 if made is None else made.nbytes
    _total += _sizes[key]


def _drop(key: tuple) -> None:
    global _total
    _total -= _sizes.pop(key)
    del _built[key]


def _trim(keep: int) -> None:
    while _total > LIMIT_BYTES and len(_built) > keep:
        _drop(next(iter(_built)))
