"""One layer whose input and output are turned in its forward, while its weight stays as it is stored."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import comfy.ops
import torch
from torch import nn

from ...oft_core import Diff, LayerRotation, Patch, Strength, cache
from ...oft_core.activations import Change, Pipeline, arriving_delta, map_vectors, terms_of
from ...oft_core.adapter import apply_swapped_
from .layers import CONV, EMBEDDING, LINEAR, answers, gguf_type, kind_of

# States of one layer that are kept beside each other where hooks take turns.
KEPT_STATES = 4


class Factor(Protocol):
    """What multiplies a strength: `now`. comes_back: whether earlier values return soon, as those of hooks do."""

    comes_back: bool

    @property
    def now(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Entry:
    """One change of one layer: what and how strongly, and the same as a weight patch of ComfyUI.

    follows: what multiplies the strength, a schedule's track or a hook; None for a strength that stays.
    """

    patch: Patch
    full: Strength
    as_weight: Any
    follows: Factor | None = None

    @property
    def at(self) -> Strength:
        """The strength at this moment."""
        return self.full if self.follows is None else replace(self.full, value=self.full.value * self.follows.now)

    @property
    def measured(self) -> torch.Tensor | None:
        """What the change needs of the unpatched weight, norms of rows in its own order; or None."""
        measured = self.as_weight.weights[0][1]
        if measured is None or measured.ndim > 1 or not self.patch.swap_halves:
            return measured
        return torch.cat(measured.chunk(2)[::-1])

    def built(self, device: torch.device) -> Any:
        """The rotation's matrices on a device, None for a difference and at strength 0."""
        if isinstance(self.patch.op, Diff) or self.at.value == 0:
            return None
        _, token, place, *_ = self.as_weight.weights[2]
        return cache.rotation(token, place, self.at, device, self.patch.op, self.patch.module)

    def for_host(self) -> tuple:
        """The entry of ComfyUI's patch list that does the same to the weight."""
        offset = None if self.patch.rows is None else (0, *self.patch.rows)
        return (self.full.value, self.as_weight, 1.0, offset, None)


class TurnedLayer:
    """One layer with all changes that a patcher makes to its activations."""

    def __init__(self, module: nn.Module, entries: Sequence[Entry], rows: int, weight_state: Callable[[], tuple]):
        self.module, self.entries, self.rows = module, tuple(entries), rows
        measures = any(isinstance(e.patch.op, LayerRotation) and e.patch.op.norm_of == "current" for e in self.entries)
        # What norms of the arriving weight have been measured on; nothing where none are.
        self.weight_state = weight_state if measures else tuple
        self.kind = kind_of(module, "weight")
        packed_bias = gguf_type(getattr(module, "bias", None)) is not None
        self.whole_kernel = self.kind == CONV and (packed_bias or any(map(self._turns_kernel, self.entries)))
        self.made: OrderedDict[tuple, dict[torch.device, Any]] = OrderedDict()
        self.kept = KEPT_STATES if any(e.follows is not None and e.follows.comes_back for e in self.entries) else 1

    def _turns_kernel(self, entry: Entry) -> bool:
        """Convolutions where the pixels under the kernel are rotated together, not each one's channels."""
        op, module = entry.patch.op, self.module
        if isinstance(op, Diff) or op.memory_view or op.added is not None or op.norm_of == "current":
            return True
        pointwise = all(n == 1 for n in module.kernel_size) and module.groups == 1
        return not pointwise and (op.side == "in" or op.col_scale is not None)

    def __call__(self, original: Callable, x: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        if all(e.at.value == 0 for e in self.entries):
            return original(x, *args, **kwargs)
        if hasattr(x, "_qdata"):  # a quantised input of ComfyUI's
            x = x.dequantize()
        device = x.device.type
        mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

        def callers() -> Any:
            return contextlib.nullcontext() if mixed is None else torch.autocast(device, mixed)

        def layer(v: torch.Tensor) -> torch.Tensor:
            with callers():
                return original(v, *args, **kwargs)

        with torch.autocast(device, enabled=False):
            if self.kind == EMBEDDING:
                y = layer(x)
                for terms in self._prepared(y.device, self._table_terms):
                    y = map_vectors(y, terms)
                return y
            if self.whole_kernel:
                return self._convolved(x, callers)
            axis, plain = (-1, 2) if self.kind == LINEAR else (1, len(self.module.kernel_size) + 2)
            batch = x if x.ndim >= plain else x.unsqueeze(0)
            pipeline = self._prepared(x.device, lambda device: self._pipeline(device, layer, x.dtype))
            y = pipeline(batch, layer, lambda y: self._bias(y, layer, x.dtype), axis)
            return y if x.ndim >= plain else y.squeeze(0)

    def _prepared(self, device: torch.device, make: Callable[[torch.device], Any]) -> Any:
        now = (*(e.at.value for e in self.entries), self.weight_state())
        if now not in self.made:  # a schedule has moved on, or another hook has its turn
            while len(self.made) >= self.kept:
                self.made.popitem(last=False)
            self.made[now] = {}
        self.made.move_to_end(now)
        made = self.made[now]
        if device not in made:
            with torch.inference_mode(False), torch.no_grad():
                made[device] = make(device)
        return made[device]

    def _table_terms(self, device: torch.device) -> list:
        return [terms_of(e.patch.op, e.at, e.built(device), e.measured, device) for e in self.entries]

    def _pipeline(self, device: torch.device, layer: Callable, dtype: torch.dtype) -> Pipeline:
        changes: list[Change] = []
        for e in self.entries:
            start, length = e.patch.rows or (0, self.rows)
            op, norm = e.patch.op, e.measured
            if isinstance(op, LayerRotation) and op.norm_of == "current" and op.row_scale is not None:
                before, rows = Pipeline(changes, self.rows), slice(start, start + length)
                norm = self._arriving_norm(before, e, rows, layer, dtype, device)
            terms = terms_of(op, e.at, e.built(device), norm, device)
            changes.append(Change(start, start + length, terms, e.patch.swap_halves))
        return Pipeline(changes, self.rows)

    def _arriving_norm(
        self,
        before: Pipeline,
        e: Entry,
        rows: slice,
        layer: Callable,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Row norms of the weight as this change finds it, measured once."""

        def changed(x: torch.Tensor) -> torch.Tensor:
            return before(x, layer, lambda y: self._bias(y, layer, dtype), -1)

        weight = answers(changed, self.module, dtype, device)[rows]
        if e.patch.swap_halves:
            weight = torch.cat(weight.chunk(2)[::-1])
        delta, gain = arriving_delta(e.patch.op, e.at)
        if delta is not None:
            weight = weight + gain * delta.to(weight.device, torch.float32).reshape(weight.shape)
        return weight.norm(dim=1)

    def _bias(self, y: torch.Tensor, layer: Callable, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias (out,) as the layer has just added it."""
        bias = getattr(self.module, "bias", None)
        if bias is None:
            return None
        if gguf_type(bias) is not None or not bias.is_floating_point():
            return layer(torch.zeros(1, self.module.in_features, device=y.device, dtype=dtype))[0]
        bias = bias.detach().as_subclass(torch.Tensor).to(y.device, y.dtype)
        # Dynamic VRAM keeps a patch of the bias beside the functions.
        patch = getattr(self.module, "bias_lowvram_function", None)
        for change in (*([] if patch is None else [patch]), *getattr(self.module, "bias_function", ())):
            bias = change(bias.clone())
        return bias

    def _convolved(self, x: torch.Tensor, callers: Callable) -> torch.Tensor:
        """A convolution with its kernel turned for this call, in float32, rounded once to x's dtype.

        Exact, with nothing stored; costs one rotation of the kernel a call.
        """
        cast = getattr(self.module, "cast_bias_weight", None)  # GGUF layers unpack their weights there
        lent = None
        if cast is not None:
            weight, bias = cast(x)[:2]
        elif hasattr(self.module, "comfy_cast_weights"):
            lent = comfy.ops.cast_bias_weight(self.module, x, offloadable=True)
            weight, bias = lent[:2]
        else:
            weight, bias = self.module.weight, self.module.bias
        try:
            built = self._prepared(x.device, lambda device: [e.built(device) for e in self.entries])
            kernel = self.turned(weight, built).to(x.dtype)
            with callers():
                return self.module._conv_forward(x, kernel, bias)
        finally:
            if lent is not None:
                comfy.ops.uncast_bias_weight(self.module, *lent)

    @torch.no_grad()
    def turned(self, weight: torch.Tensor, built: Sequence[Any]) -> torch.Tensor:
        """A float32 copy of the layer's weight with all changes. built: of each entry, on its device."""
        out = weight.detach().to(torch.float32, copy=True)
        for e, matrices in zip(self.entries, built, strict=True):
            rows = out if e.patch.rows is None else out.narrow(0, *e.patch.rows)
            norm = e.as_weight.weights[0][1]
            apply_swapped_(e.patch.op, rows, e.at, e.patch.swap_halves, rotation=matrices, measured=norm)
        return out
