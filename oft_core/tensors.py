"""Tensors that outlive the call that made them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Make ordinary tensors, without gradients, although hosts work under inference mode: for what is kept."""
    with torch.inference_mode(False), torch.no_grad():
        yield
