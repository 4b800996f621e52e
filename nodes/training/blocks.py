"""ComfyUI's blocks made fit for a backward pass: code that works in place, and kernels that only go forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.ldm.modules.attention
import torch
from torch import nn


def plain_attention(_: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Faster kernels that a host may have chosen have no backward pass."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def copied_input(_: nn.Module, args: tuple) -> tuple:
    """Host code adds to hidden states in place, which would destroy what a norm has kept of them."""
    if torch.is_grad_enabled() and args and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
        return (args[0].clone(), *args[1:])
    return args


@contextlib.contextmanager
def inputs_kept(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks work on copies of their inputs: some add to them in place, and computing such a block a second time
    would then start from other numbers, without any error.
    """

    def kept(forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            return forward(*map(_copy, args), **{k: _copy(v) for k, v in kwargs.items()})

        return run

    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = kept(block.forward)
        yield
    finally:
        for block, forward in before:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def _copy(value: Any) -> Any:
    """Hidden states (batch, tokens, width) and (batch, channels, h, w), with or without gradient."""
    hidden = isinstance(value, torch.Tensor) and value.ndim in (3, 4) and value.is_floating_point()
    return value.clone() if hidden and torch.is_grad_enabled() else value


def blocks_of(root: nn.Module) -> Sequence[nn.Module]:
    """Modules to checkpoint: transformer and residual blocks, outermost first, none inside another."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in root.modules():
        name = type(module).__name__
        if id(module) in inside or not name.endswith(("Block", "StreamBlock", "CLIPLayer")):
            continue
        if not any(isinstance(m, nn.Linear) for m in module.modules()):
            continue
        found.append(module)
        inside |= {id(m) for m in module.modules()}
    return found
