"""Tensors that outlive the call that made them, and arithmetic that is not the host's to choose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Make ordinary tensors, without gradients, although hosts work under inference mode: for what is kept."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No autocast: web UIs switch it on around all their work, and products would be of half precision. Also a decorator."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device, queued behind the card's other work where it comes from ordinary memory: the host does not wait.

    That is safe in this direction: the driver has read ordinary memory when the call returns. Pinned memory must not change before.
    """
    to_card = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return tensor.to(device, dtype or tensor.dtype, non_blocking=to_card)


def ordinary_(root: nn.Module) -> None:
    """Replace parameters and buffers that were made under inference mode by equal ordinary ones, in place.

    Autograd refuses to keep inference tensors for the backward pass. One tensor at a time, so little more memory is
    needed; the values are the same bit for bit, so the new ones stay.
    """
    for module in root.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_inference():
                module._parameters[name] = _ordinary_parameter(p)
        for name, b in module._buffers.items():
            if b is not None and type(b) is torch.Tensor and b.is_inference():
                module._buffers[name] = b.detach().clone()


def _ordinary_parameter(p: torch.Tensor) -> torch.Tensor:
    """An equal parameter that autograd accepts. Packed numbers stay: what is unpacked from them is ordinary already."""
    if type(p) is nn.Parameter:
        return nn.Parameter(p.detach().clone(), requires_grad=False)
    if hasattr(p, "_qdata") or not p.is_floating_point():
        return p
    # GGUF loaders wrap weights that are not quantised too, in a class that answers `clone` with the tensor itself.
    out = p.as_subclass(torch.Tensor).clone().as_subclass(type(p))
    out.__dict__.update(p.__dict__)
    return out
