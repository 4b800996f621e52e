"""What a run depends on: a short hash of a model as it is given."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import comfy.utils
import torch
from torch import nn

from . import runtime

def _numbers(t: torch.Tensor, most: int = 512) -> bytes:
    """Up to `most` evenly spaced values of a tensor, as bytes."""
    t = getattr(t, "_qdata", t)
    t = t.detach() if type(t) in (torch.Tensor, nn.Parameter) else t.as_subclass(torch.Tensor)
    flat = t.reshape(-1)
    flat = flat[:: max(1, flat.numel() // most)][:most].contiguous().cpu()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _tensors(value: Any) -> Iterator[bytes]:
    """Everything in a patch that changes what it does; not counters, which differ between equal patches."""
    if isinstance(value, torch.Tensor):
        yield str(tuple(value.shape)).encode() + _numbers(value)
    elif isinstance(value, (float, str)):
        yield str(value).encode()
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif hasattr(value, "weights"):
        yield type(value).__name__.encode()
        yield from _tensors(value.weights)


def identity(patcher: Any) -> str:
    """A short hash of a model with its patches: of names, shapes and some hundred values of every weight."""
    seen = hashlib.sha256()
    for key, value in sorted(patcher.model.state_dict().items()):
        saved = patcher.backup.get(key)
        value = value if saved is None else getattr(saved, "weight", value)
        if value.is_meta:  # GGUF layers show a stand-in there
            value = comfy.utils.get_attr(patcher.model, key)
        seen.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        if not value.is_meta:
            seen.update(_numbers(value))
    for key, patches in sorted(patcher.patches.items()):
        for strength, value, strength_model, offset, *_ in patches:
            seen.update(f"{key} {strength} {strength_model} {offset}".encode())
            for part in _tensors(value):
                seen.update(part)
    for key, entries in sorted(runtime.live_entries(patcher).items()):
        for entry in entries:
            seen.update(f"activations {key} {entry.at} {entry.patch.rows}".encode())
            for part in _tensors(entry.as_weight):
                seen.update(part)
    return seen.hexdigest()[:32]
