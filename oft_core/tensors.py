"""Tensors that outlive the call that made them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Make ordinary tensors, without gradients, although hosts work under inference mode: for what is kept."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on a device, queued behind the card's other work where it comes from ordinary memory: the host does not wait.

    That is safe in this direction: the driver has read ordinary memory when the call returns. Pinned memory must not change before.
    """
    to_card = tensor.device.type == "cpu" and torch.device(device).type == "cuda"
    return tensor.to(device, dtype or tensor.dtype, non_blocking=to_card)
