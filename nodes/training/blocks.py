"""ComfyUI's blocks made fit for a backward pass: code that works in place, and kernels that only go forward."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.ldm.common_dit
import comfy.ldm.modules.attention
import torch
from torch import nn

from ...oft_core.training.roles import ATTENTION, roles


def plain_attention(_: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Faster kernels that a host may have chosen have no backward pass."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


class InputCopies:
    """Gives norms and turned layers a copy of what they read.

    Host code adds to hidden states in place, which would destroy what they have kept of them for the backward pass;
    where a block is computed a second time, without any error. Layers that read the same states one after another
    (queries, keys, values) share one copy. An instance is a forward pre-hook for modules.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref, int, weakref.ref] | None = None

    def copied(self, given: Any) -> Any:
        if not (torch.is_grad_enabled() and isinstance(given, torch.Tensor) and given.is_floating_point()):
            return given
        if self._last is not None:
            source, version, made = self._last
            if (copy := made()) is not None and (copy is given or source() is given and version == given._version):
                return copy
        copy = given.clone()
        self._last = (weakref.ref(given), given._version, weakref.ref(copy))
        return copy

    def __call__(self, _: nn.Module, args: tuple) -> tuple:
        return (self.copied(args[0]), *args[1:]) if args else args

    @contextlib.contextmanager
    def of_functions(self) -> Iterator[None]:
        """Inside, the norm that ComfyUI's models call without a module gets copies too."""
        plain = comfy.ldm.common_dit.rms_norm

        def rms_norm(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return plain(self.copied(x), *args, **kwargs)

        comfy.ldm.common_dit.rms_norm = rms_norm
        try:
            yield
        finally:
            comfy.ldm.common_dit.rms_norm = plain


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
    """Hidden states (batch, tokens, width), (batch, channels, h, w) and with frames, with or without gradient."""
    hidden = isinstance(value, torch.Tensor) and value.ndim in (3, 4, 5) and value.is_floating_point()
    return value.clone() if hidden and torch.is_grad_enabled() else value


def blocks_of(root: nn.Module) -> Sequence[nn.Module]:
    """Modules to checkpoint: transformer and residual blocks, outermost first, none inside another.

    Known by the names of their classes; and in models that name them otherwise, the members of lists of modules that
    have attention in them.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()

    def take(module: nn.Module) -> None:
        found.append(module)
        inside.update(id(m) for m in module.modules())

    for module in root.modules():
        named = type(module).__name__.endswith(("Block", "StreamBlock", "CLIPLayer"))
        if named and id(module) not in inside and any(isinstance(m, nn.Linear) for m in module.modules()):
            take(module)
    for listed in root.modules():
        for module in listed if isinstance(listed, nn.ModuleList) else ():
            names = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
            if any(id(m) in inside for m in module.modules()) or not roles(module, names)[ATTENTION]:
                continue
            take(module)
    return found
