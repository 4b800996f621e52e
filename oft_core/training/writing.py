"""What a training has learnt, as a file that is read back at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from ..adapter import Adapter, load_adapter
from ..diff import Diff
from ..errors import FormatError
from ..formats.write import WRITERS, write_adapter
from ..layer import LayerRotation
from ..names import NameIndex
from .layers import RotationBank

# Dialects in the order in which a trained adapter is written: the first that can hold it.
DIALECTS = ("oft_v2", "lycoris", "comfy", "oft_v2_plus")


def write_bank(
    bank: RotationBank,
    values: Mapping[str, torch.Tensor] | None,
    path: str,
    metadata: Mapping[str, str],
    index: NameIndex,
    prefix: Mapping[str, str],
) -> tuple[Adapter, str]:
    """Write what the bank has learnt and read it back: (adapter, dialect).

    values: of its parameters, None for those it has.   prefix: part -> what stands before its modules' names in `index`.
    Raises FormatError with the reasons of all dialects if none can hold it.
    """
    layers: dict[str, LayerRotation] = {}
    beside: dict[str, Diff] = {}
    for (part, module), pieces in bank.adapter_tensors(values).items():
        for piece in pieces:
            place = layers if isinstance(piece.op, LayerRotation) else beside
            place[f"{prefix[part]}{module}.{piece.param}"] = piece.op
    refused = []
    for dialect in DIALECTS:
        try:
            written = write_adapter(
                layers, index, path, dialect, beside=beside, metadata=metadata
            )
        except FormatError as error:
            refused.append(str(error))
            continue
        adapter = load_adapter(written)
        patches = adapter.bind(index).patches
        missing = {*layers, *beside} - {p.key for p in patches}
        if missing:
            raise FormatError("A layer could not be read back", file=path, module=min(missing))
        turned = Counter(p.key for p in patches if isinstance(p.op, LayerRotation))
        for key, count in turned.items():
            if count != 1 or key not in layers:
                raise FormatError(
                    "The file turns a weight more often than the training did",
                    file=path,
                    module=key,
                    found=f"{count} rotations",
                    expected=f"{int(key in layers)}",
                )
        return adapter, WRITERS[dialect].title
    raise FormatError("No file format can hold an adapter with these settings", found=" ".join(refused))
