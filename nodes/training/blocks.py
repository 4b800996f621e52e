"""What of ComfyUI's own functions must be another one in a backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import torch

from ...oft_core.training.blocks import InputCopies


def plain_attention(_: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Faster kernels that a host may have chosen have no backward pass."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


@contextlib.contextmanager
def norms_copied(copies: InputCopies) -> Iterator[None]:
    """Inside, the norm that ComfyUI's models call without a module reads copies."""
    plain = comfy.ldm.common_dit.rms_norm

    def rms_norm(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain(copies.copied(x), *args, **kwargs)

    comfy.ldm.common_dit.rms_norm = rms_norm
    try:
        yield
    finally:
        comfy.ldm.common_dit.rms_norm = plain
