"""The state in which training runs inside ComfyUI: gradients on, randomness of its own, ordinary tensors, memory given back."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import comfy.model_management
import torch

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
