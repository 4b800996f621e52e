"""A layer's change at one strength, as a web UI asks for it: a weight comes in and is turned in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..oft_core import LayerRotation, Patch, Strength, cache
from ..oft_core.adapter import apply_swapped_
from ..oft_core.tensors import normal_tensors


class Portion(cache.Batch):
    """A batch whose rotations are given back once each has been used."""

    def __init__(self, ops: Sequence[LayerRotation], mode: str):
        super().__init__(ops, mode)
        self._left: set[int] = set()

    def used(self, place: int) -> None:
        """One rotation has done its work."""
        self._left = self._left or set(range(len(self.ops)))
        self._left.discard(place)
        if not self._left:
            cache.release([self.token])


@dataclass(eq=False)
class Change:
    """One patch at one strength.

    batch, place: where its rotation is built together with others; None for differences.
    measured: what the patch needs of the base weight, for the layers that ask for it.
    again: whether the weight is asked for in every step, so that built rotations are worth keeping.
    """

    patch: Patch
    at: Strength
    batch: Portion | None
    place: int
    measured: Tensor | None
    again: bool

    def apply_(self, weight: Tensor) -> Tensor:
        """Turn the patch's rows of a weight in place and return them. weight: these rows only, any floating dtype.

        Hosts work under autocast and inference mode; the arithmetic is float32 all the same.
        """
        op = self.patch.op
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            built = None
            if self.batch is not None:
                with normal_tensors():
                    built = cache.rotation(self.batch.token, self.place, self.at, weight.device, op, self.patch.module)
            apply_swapped_(op, weight, self.at, self.patch.swap_halves, rotation=built, measured=self.measured)
        if self.batch is not None and not self.again:
            self.batch.used(self.place)
        return weight


def changes(
    placed: Iterable[tuple[Patch, Strength]], measured: Callable[[Patch], Tensor], *, again: bool
) -> list[Change]:
    """The patches of one part of a model as changes, in order; those of strength 0 are left out.

    measured: gives `Patch.measure` of a patch's unpatched weight; asked only where a layer needs it.
    """
    acting = [(patch, at) for patch, at in placed if at.value != 0]
    by_strength: dict[Strength, list[int]] = {}
    for i, (patch, at) in enumerate(acting):
        if isinstance(patch.op, LayerRotation):
            by_strength.setdefault(at, []).append(i)
    where: dict[int, tuple[Portion, int]] = {}
    for at, members in by_strength.items():
        made = cache.batches([acting[i][0].op for i in members], at.mode, Portion)
        where |= dict(zip(members, made, strict=True))
    out = []
    for i, (patch, at) in enumerate(acting):
        batch, place = where.get(i, (None, 0))
        with normal_tensors():
            of_base = measured(patch) if patch.op.needs_base else None
        out.append(Change(patch, at, batch, place, of_base, again))
    return out
