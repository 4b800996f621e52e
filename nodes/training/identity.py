"""Which model it is: a short hash of a model as it is given, and the file that it came from where that can be told."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import nn

from ..binding import layers, runtime

# Folder lists that loaders of diffusion models choose from; the last one is of the community's GGUF loader.
MODEL_FOLDERS = ("checkpoints", "diffusion_models", "unet_gguf")
# ComfyUI swaps this part on the shared model when it loads a clone with another way of sampling, so its buffers tell
# what was loaded last. How a model samples is in the objective.
SAMPLING = "model_sampling."


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
    """A short hash of a model with its patches: of names, shapes and some hundred values of every weight.

    The same whether the model is loaded or not. How it samples is not in it.
    """
    seen = hashlib.sha256()
    for key, value in sorted(layers.tensors_of(patcher.model, patcher.model.state_dict())):
        if key.startswith(SAMPLING):
            continue
        saved = patcher.backup.get(key)
        value = value if saved is None else getattr(saved, "weight", value)
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


def model_file(patcher: Any, prompt: Mapping[str, Any] | None, node_id: Any) -> Path | None:
    """The file that the MODEL at the input `model` of a node was loaded from, or None where that cannot be told.

    ComfyUI gives a node no file. Later hosts note on the patcher how it was loaded; otherwise the graph is followed
    upwards, through nodes that take a `model`, to a loader with the name of a model file. prompt: the graph as it
    was queued (API form).
    """
    made_by = getattr(patcher, "cached_patcher_init", None)
    for given in made_by[1] if made_by else ():
        if isinstance(given, (str, Path)) and os.path.isfile(given):
            return Path(given)
    node = (prompt or {}).get(str(node_id))
    for _ in range(len(prompt or {})):
        inputs = node.get("inputs", {}) if node else {}
        link = inputs.get("model")
        if not isinstance(link, list):
            return _named_file(inputs)
        node = prompt.get(str(link[0]))
    return None


def _named_file(inputs: Mapping[str, Any]) -> Path | None:
    """The model file that one of a loader's inputs names."""
    for folder in MODEL_FOLDERS:
        if folder in folder_paths.folder_names_and_paths:
            for value in inputs.values():
                found = folder_paths.get_full_path(folder, value) if isinstance(value, str) and value else None
                if found and os.path.isfile(found):
                    return Path(found)
    return None
