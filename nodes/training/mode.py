"""The state in which training runs inside ComfyUI: gradients on, randomness of its own, ordinary tensors, memory given back."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import comfy.model_management
import torch
from torch import nn

from ...oft_core.training import TrainingError

OUT_OF_MEMORY = comfy.model_management.OOM_EXCEPTION
Stopped = comfy.model_management.InterruptProcessingException


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Nodes run under inference mode, in which nothing can be trained."""
    management = comfy.model_management
    flag = getattr(management, "in_training", None)  # later hosts
    try:
        if flag is not None:
            management.in_training = True
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if flag is not None:
            management.in_training = flag


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


def free_memory() -> None:
    """Give memory back after a run that failed."""
    gc.collect()
    comfy.model_management.soft_empty_cache(True)


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Out of memory outside of the steps (encoding, loading, sampling) as a clear error."""
    found = ""
    try:
        yield
    except OUT_OF_MEMORY as error:
        found = str(error).splitlines()[0]
    if found:
        # Raised out here so that the traceback does not keep the tensors alive.
        free_memory()
        raise TrainingError(
            "Out of memory while the training was prepared or a sample was drawn",
            found=found,
            hint="Lower the resolution or the batch size, or set low_vram to 'offload'.",
        )
