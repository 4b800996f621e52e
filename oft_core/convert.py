"""An adapter in another tool's dialect."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from .adapter import Adapter
from .errors import FormatError
from .formats.write import write_adapter
from .formats.write_beside import BaseWeights
from .layer import Diff, LayerRotation
from .names import NameIndex

#: The dialect that is a folder; every other one is a file.
FOLDER = "peft"


def convert(
    adapter: Adapter,
    index: NameIndex,
    target: str | os.PathLike,
    dialect: str,
    *,
    base: BaseWeights | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write an adapter in one of ``WRITERS``; returns the file. It holds exactly the same rotations, or there is none.

    index: of the model that the adapter is for.   target: a file; for ``peft`` its name without ending is the folder.
    base: parameter key -> the model's own value, for dialects that keep whole values where the adapter has differences, or the
    other way round.   dtype: of generators and scales. Raises FormatError with the reason where that cannot be, and what `bind`
    raises for another model.
    """
    binding = adapter.bind(index)
    if binding.unmatched:
        raise FormatError(
            "Not every layer of this adapter belongs to this model", module=next(iter(binding.unmatched)),
            hint="Choose the model (and its text encoders) that it was made for.",
        )
    layers: dict[str, LayerRotation] = {}
    beside: dict[str, Diff] = {}
    for patch in binding.patches:
        place = layers if isinstance(patch.op, LayerRotation) else beside
        if patch.rows or patch.swap_halves or patch.key in place:
            raise FormatError("This adapter has a layer that cannot be written in another dialect", module=patch.module)
        place[patch.key] = patch.op
    target = Path(target).with_suffix("") if dialect == FOLDER else Path(target)
    return write_adapter(layers, index, target, dialect, beside=beside, base=base, metadata=metadata, dtype=dtype)
