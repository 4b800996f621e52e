"""How a model holds the weights of its layers: plainly, packed or quantised, and by which class of layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from torch import nn

LINEAR, CONV, EMBEDDING = "linear", "conv", "embedding"
# Inputs with which the rows of a weight are measured at a time, and their size: above 1, so that the bias
# does not swallow the weight's digits in half precision.
PROBES, PROBE_SIZE = 256, 256.0


def layer_of(model: nn.Module, key: str) -> tuple[Any, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    owner, _, leaf = key.rpartition(".")
    return (comfy.utils.get_attr(model, owner) if owner else model), leaf


def tensors_of(model: nn.Module, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a model's state dict.

    GGUF loaders list stand-ins on the meta device. They come back as the layer's own packed tensors; names by which
    such a loader only reserves room for unpacking, and which no layer has, are left out.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    for key, value in state.items():
        if not value.is_meta:
            yield key, value
        elif key in own:
            yield key, own[key]


def kind_of(module: Any, leaf: str) -> str | None:
    """The kind of layer, if its activations can stand for this parameter, else None."""
    if leaf != "weight":
        return None
    if isinstance(module, nn.modules.conv._ConvNd):
        return None if module.transposed else CONV
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    # Banks of experts have these sizes too, and a matrix for each expert.
    several = isinstance(module, nn.Bilinear) or getattr(getattr(module, "weight", None), "ndim", 2) > 2
    return LINEAR if all(isinstance(n, int) for n in sizes) and not several else None


def gguf_type(tensor: Any) -> str | None:
    """Name of the GGML type of a packed tensor, as GGUF loaders mark it; None for plain numbers."""
    kind = getattr(tensor, "tensor_type", None)
    return None if kind is None or int(kind) in (0, 1) else getattr(kind, "name", str(kind))


def stored_as(module: Any) -> str | None:
    """In words, how the layer's weight is quantised; None for numbers that a patch rounds once as usual."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    if (name := gguf_type(weight)) is not None:
        return f"GGUF {name}"
    if getattr(weight, "tensor_type", None) is not None:
        return None
    if type(weight).__module__.partition(".")[0] == "bitsandbytes":
        return f"bitsandbytes {type(weight).__name__}"
    if _keeps_numbers_its_own_way(type(weight)):
        layout = getattr(weight, "_layout_type", None) or getattr(weight, "_layout_cls", None)
        return f"quantised, {layout or type(weight).__name__}"
    if weight.dtype.is_floating_point and weight.dtype.itemsize == 1:
        return "scaled fp8" if getattr(module, "scale_weight", None) is not None else "fp8"
    return None if weight.is_floating_point() else f"packed as {weight.dtype}"


def _keeps_numbers_its_own_way(kind: type) -> bool:
    """Whether a class of tensors has its own storage, as quantised ones do, or only adds attributes."""
    above = itertools.takewhile(lambda c: c is not torch.Tensor, kind.__mro__)
    return any("__torch_dispatch__" in c.__dict__ for c in above)


def patchable(module: Any) -> bool:
    """Whether ComfyUI can patch the layer's weight at all."""
    weight = getattr(module, "weight", None)
    if gguf_type(weight) is not None or hasattr(module, "set_weight"):
        return True
    if weight is None:
        return True
    return weight.is_floating_point() and type(weight).__module__.partition(".")[0] != "bitsandbytes"


def hookable(module: Any) -> bool:
    """Whether ComfyUI's hooks, which copy weights to and fro as plain numbers, can change the layer's weight."""
    weight = getattr(module, "weight", None)
    plain = gguf_type(weight) is None and not _keeps_numbers_its_own_way(type(weight))
    return weight is None or (plain and patchable(module))


def nameless(model: nn.Module, state: Iterable[str]) -> str | None:
    """A name of the model's state that no parameter has, such as a scale; None where every name has one."""
    for key in state:
        try:
            comfy.model_patcher.get_key_weight(model, key)
        except AttributeError:
            return key
    return None


def logical_shape(model: nn.Module, key: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a packed weight as its layer means it."""
    module, leaf = layer_of(model, key)
    if kind_of(module, leaf) == LINEAR:
        return (module.out_features, module.in_features)
    return tuple(shape)


def plain_weight(patcher: Any, key: str) -> torch.Tensor | None:
    """A layer's own weight without patches, float32 copy on its own device; None where the layer hides it."""
    stored, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    module, leaf = layer_of(patcher.model, key)
    # ComfyUI merges patches first, hooks after them: what hooks keep may be patched already.
    kept = patcher.backup.get(key) or patcher.hook_backup.get(key)
    if kept is not None:
        stored = kept[0]
    if (kind := getattr(stored, "tensor_type", None)) is not None and gguf_type(stored) is not None:
        import gguf  # comes with every GGUF loader

        data = stored.as_subclass(torch.Tensor).detach().cpu().numpy()
        return torch.from_numpy(gguf.dequantize(data, kind).reshape(tuple(stored.tensor_shape))).float()
    if not patchable(module) and kind_of(module, leaf) == LINEAR:
        # No patch reaches such a layer, so what it answers is its own weight.
        return answers(lambda x: type(module).forward(module, x), module, torch.float32)
    if stored.is_meta or not torch.is_floating_point(stored):
        return None
    if convert is not None:
        return convert(stored.detach(), inplace=False).float()
    return stored.detach().to(torch.float32, copy=True)


@torch.no_grad()
def answers(
    layer: Callable[[torch.Tensor], torch.Tensor],
    module: Any,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The weight (out, in) float32 of a linear layer from its outputs for the unit vectors.

    device: where the layer computes; that of its stored weight if None.
    """
    device, n = device or module.weight.device, module.in_features
    at_zero = layer(torch.zeros(1, n, device=device, dtype=dtype)).float()
    parts = []
    for i in range(0, n, PROBES):
        units = torch.zeros(min(PROBES, n - i), n, device=device, dtype=dtype)
        units[range(len(units)), range(i, i + len(units))] = PROBE_SIZE
        parts.append((layer(units).float() - at_zero).t() / PROBE_SIZE)
    return torch.cat(parts, 1)
