"""Built rotations, kept between forwards.

A partially loaded model asks for each weight again in every forward, so the rotations must not be rebuilt
each time; a full load asks for each of them once. Layers whose blocks have one size are built together, in
batches: a few large tensor operations instead of several small ones per layer.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakValueDictionary

import torch

from .constraint import Strength
from .layer import Built, LayerRotation, build_all

# Memory for built rotations over all files and devices, in bytes. What was built last always stays.
LIMIT_BYTES = 384 << 20
# Largest batch, in bytes of built rotations: bounds what a single missing layer can cost.
BATCH_BYTES = 64 << 20

_counter = itertools.count(1)
_batches: WeakValueDictionary[int, Batch] = WeakValueDictionary()
_lock = threading.Lock()


class Batch:
    """Layers whose rotations are built together, and what was built of them.

    Lives as long as something of the host's refers to it, such as a model patcher; the built rotations go with it.
    """

    def __init__(self, ops: Sequence[LayerRotation], mode: str):
        self.ops = tuple(ops)
        self.size = sum(op.built_bytes(mode) for op in ops)
        self.token = next(_counter)
        # (strength, device) -> (time of last use, rotations)
        self.built: dict[tuple[Strength, str], tuple[int, list[Built | None]]] = {}
        _batches[self.token] = self


def batches(
    ops: Sequence[LayerRotation], mode: str, kind: Callable[[Sequence[LayerRotation], str], Batch] = Batch
) -> list[tuple[Batch, int]]:
    """Group `ops` by block size, in order, into batches of bounded size; gives (batch, place in it) for each
    op. mode: the strength mode that they will be built in.   kind: makes a batch.
    """
    groups: dict[int, list[int]] = {}
    for i, op in enumerate(ops):
        groups.setdefault(op.block, []).append(i)
    out: dict[int, tuple[Batch, int]] = {}
    for members in groups.values():
        portions, size = [[]], 0
        for i in members:
            cost = ops[i].built_bytes(mode)
            if portions[-1] and size + cost > BATCH_BYTES:
                portions.append([])
                size = 0
            portions[-1].append(i)
            size += cost
        for portion in portions:
            batch = kind([ops[i] for i in portion], mode)
            out |= {i: (batch, place) for place, i in enumerate(portion)}
    return [out[i] for i in range(len(ops))]


def rotation(
    token: int, place: int, strength: Strength, device: torch.device, spare: LayerRotation, module: str
) -> Built | None:
    """The built rotation of one layer: kept from before, or by building its whole batch.

    token, place: what `batches` gave. spare: the layer itself, built alone if the batch is gone because
    nothing but a hook's weights refers to the file any more. module: the layer's name, for messages. Raises
    StrengthError where the strength, which hooks and other packs may choose only now, is not defined for it.
    """
    batch = _batches.get(token)
    (spare if batch is None else batch.ops[place]).check_strength(strength, module=module)
    if batch is None:
        return spare.build(strength, device)
    key = (strength, str(device))
    with _lock:
        known = batch.built.get(key)
        made = known[1] if known else build_all(batch.ops, strength, device)
        batch.built[key] = (next(_counter), made)
        if not known:
            _trim()
    return made[place]


def release(tokens: Iterable[int]) -> None:
    """Forget the rotations built for these batches."""
    with _lock:
        for token in tokens:
            batch = _batches.get(token)
            if batch is not None:
                batch.built.clear()


def total_bytes() -> int:
    """Memory held by built rotations, in bytes."""
    return sum(batch.size * len(batch.built) for batch in list(_batches.values()))


def _trim() -> None:
    """Drop what was not used for longest until the limit is kept."""
    kept = [(used, batch, key) for batch in list(_batches.values()) for key, (used, _) in batch.built.items()]
    kept.sort(key=lambda entry: entry[0])
    total = sum(batch.size for _, batch, _ in kept)
    for _, batch, key in kept[:-1]:
        if total <= LIMIT_BYTES:
            return
        del batch.built[key]
        total -= batch.size
