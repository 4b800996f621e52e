"""A model's safetensors file as names, shapes and weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import FileError
from .merge import SCALES, read_header
from .names import NameIndex


@dataclass(frozen=True)
class ModelFile:
    """An open model file: where its layers are, and ``weight``: parameter key -> the stored tensor."""

    path: Path
    index: NameIndex
    _stored: safe_open
    _keys: frozenset[str]

    def weight(self, key: str) -> Tensor:
        """Raises FileError for a tensor that is not there, cannot be read, or holds codes that a scale beside it makes numbers of."""
        scale = next((s for s in SCALES if key.removesuffix("weight") + s in self._keys), None)
        if scale is not None:
            raise FileError(
                "A layer of the model is stored quantised, and its numbers are needed", file=self.path, module=key, found=scale,
                expected="floating-point weights", hint="Use an unquantised model file.",
            )
        try:
            return self._stored.get_tensor(key)
        except (SafetensorError, ValueError, AttributeError) as error:
            raise FileError("A tensor of the model cannot be read", file=self.path, module=key, found=str(error)) from error


@contextmanager
def open_model(path: str | os.PathLike) -> Iterator[ModelFile]:
    """Raises FileError for what is no safetensors file, saying what it is and what to do."""
    stored, _ = read_header(path)
    with safe_open(path, "pt") as file:
        yield ModelFile(Path(path), NameIndex({key: s.shape for key, s in stored.items() if s.dtype is not None}), file, frozenset(stored))
