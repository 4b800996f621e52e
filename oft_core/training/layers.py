"""The rotations in training: built once a step from one packed parameter per block size, used by the frozen layers' forwards.

Data flow of a step: ``begin_step`` builds every rotation (float32, autocast off) and cuts the result into one leaf per layer;
forwards of the adapted layers use the leaves; backward passes collect their gradients in one buffer; ``finish_backward`` sends the
buffer through the build, once, whatever the number of accumulated batches. Nothing is built inside checkpointed regions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..constraint import Constraint
from ..formats.common import Piece
from ..layer import Diff, LayerRotation
from ..rotation import neumann_coefficients, polynomial, unpack_skew
from .config import OFTConfig
from .errors import ConfigError
from .functions import (
    CayleyOfPacked,
    RotatedConv,
    RotateLast,
    compute_dtype,
    generator_scale,
    limit_lam_,
    no_autocast,
    plain,
    rotate_channels,
)
from .optim import limit_
from .seeds import generator
from .selection import LayerChoice, Selection

#: Returns the plain weight of a layer (any float dtype) where ``module.weight`` is packed or quantised.
WeightOf = Callable[[nn.Module], Tensor]


# -------------------------------------------------------------------- built tensors


class _Built:
    """One packed parameter, what is built from it, and the leaves that layers use."""

    def __init__(self, parameter: nn.Parameter, build: Callable[[Tensor], Tensor], cuts: Sequence[tuple[int, int]]):
        self.parameter, self.build, self.cuts = parameter, build, cuts
        self.out: Tensor | None = None
        self.buffer: Tensor | None = None
        self.leaves: list[Tensor] = []

    def begin(self, train: bool, value: Tensor | None = None) -> None:
        """Build from the parameter (or another value of it). With ``train``, leaves collect gradients in one buffer."""
        device = self.parameter.device
        with torch.set_grad_enabled(train), no_autocast(device):
            self.out = self.build(self.parameter if value is None else value)
        whole = self.out.detach()
        self.buffer = torch.zeros_like(whole) if train else None
        self.leaves = []
        for start, length in self.cuts:
            leaf = whole[start : start + length]
            if train:
                leaf.requires_grad_(True)
                # Autograd adds to an existing .grad in place, so all gradients land in the buffer.
                leaf.grad = self.buffer[start : start + length]
            self.leaves.append(leaf)

    def finish(self, divisor: float) -> None:
        """Send the collected gradient through the build into ``parameter.grad`` (added to what is there)."""
        if self.out is None or self.buffer is None:
            raise RuntimeError("finish_backward needs begin_step before it")
        for leaf, (start, length) in zip(self.leaves, self.cuts, strict=True):
            part = self.buffer[start : start + length]
            if leaf.grad is not None and leaf.grad.data_ptr() != part.data_ptr():
                part.copy_(leaf.grad)
        if divisor != 1:
            self.buffer /= divisor
        with no_autocast(self.parameter.device):
            torch.autograd.backward(self.out, self.buffer)
        self.clear()

    def clear(self) -> None:
        self.out = self.buffer = None
        self.leaves = []


@dataclass
class _Slot:
    """One adapted module while training: where its leaves are found."""

    module: nn.Module
    choice: LayerChoice | None = None
    rotation: tuple[_Built, int] | None = None
    scale: tuple[_Built, int] | None = None
    bias: tuple[_Built, int] | None = None
    saved: dict[str, nn.Parameter] | None = None
    inside: bool = False


_MISSING = object()


class RotationBank:
    """All that is trained, for one or more parts of a model (for example ``unet`` and ``te1``).

    parts: part name -> (model, selection). Parameters are float32 (``dtype``) on the device of each part's first parameter, or on
    ``device``: per part and block size one ``rotation`` (blocks, b(b-1)/2), per part at most one ``scale`` (log of the row
    magnitudes) and one ``bias`` (differences), and one ``saved`` per parameter of the modules trained whole.
    seed: of random initial values (``init_weights`` off) and of the block dropout.   weight_of: see ``WeightOf``.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[nn.Module, Selection]],
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        weight_of: WeightOf | None = None,
    ):
        self.parts = dict(parts)
        self.seed = seed
        self.dtype = dtype
        self.weight_of = weight_of or plain_weight
        #: name -> parameter, in a fixed order; names are "part/rotation/block", "part/scale", "part/bias", "part/saved/module.param"
        self.parameters: dict[str, nn.Parameter] = {}
        self._built: dict[str, _Built] = {}
        self._slots: dict[tuple[str, str], _Slot] = {}
        self._members: dict[str, list[LayerChoice]] = {}
        self._masks: dict[str, Tensor] = {}
        self._active = False
        self._installed = False
        for part, (model, selection) in self.parts.items():
            first = next(model.parameters(), None)
            where = torch.device(device) if device is not None else first.device if first is not None else torch.device("cpu")
            self._add_part(part, model, selection, where)

    # ---------------------------------------------------------------- construction

    def _add_part(self, part: str, model: nn.Module, selection: Selection, device: torch.device) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        config = selection.config
        self._check_biases(selection, modules)
        for choice in selection.layers:
            self._slots[part, choice.name] = _Slot(modules[choice.name], choice)
        for block in sorted({c.block for c in selection.layers}):
            members = [c for c in selection.layers if c.block == block]
            name = f"{part}/rotation/{block}"
            total = sum(c.stored for c in members)
            start = torch.zeros(total, block * (block - 1) // 2, dtype=self.dtype)
            if not config.init_weights:
                start.normal_(0, 0.1, generator=generator(self.seed, "init", name))
            self._members[name] = members
            built = self._register(name, start.to(device), self._builder(name, config, block), [c.stored for c in members])
            for i, choice in enumerate(members):
                self._slots[part, choice.name].rotation = (built, i)
        if config.rescale:
            members = selection.layers
            self._members[f"{part}/scale"] = members
            zero = torch.zeros(sum(c.rows for c in members), dtype=self.dtype, device=device)
            built = self._register(f"{part}/scale", zero, torch.exp, [c.rows for c in members])
            for i, choice in enumerate(members):
                self._slots[part, choice.name].scale = (built, i)
        if selection.biases:
            lengths = [modules[n].bias.numel() for n in selection.biases]
            zero = torch.zeros(sum(lengths), dtype=self.dtype, device=device)
            built = self._register(f"{part}/bias", zero, lambda p: p * 1, lengths)
            for i, name in enumerate(selection.biases):
                slot = self._slots.setdefault((part, name), _Slot(modules[name]))
                slot.bias = (built, i)
        for name in selection.modules_to_save:
            slot = self._slots.setdefault((part, name), _Slot(modules[name]))
            slot.saved = {}
            for key, p in modules[name].named_parameters():
                if not p.is_floating_point() or p.dtype.itemsize == 1:
                    raise ConfigError(
                        "A module with quantised weights cannot be trained whole", module=f"{name}.{key}", found=str(p.dtype),
                        expected="float32, float16 or bfloat16", hint="Leave it out of 'modules_to_save'.",
                    )
                trained = nn.Parameter(plain(p).to(device, self.dtype, copy=True))
                slot.saved[key] = self.parameters[f"{part}/saved/{name}.{key}"] = trained

    @staticmethod
    def _check_biases(selection: Selection, modules: Mapping[str, nn.Module]) -> None:
        rotated = {c.name for c in selection.layers}
        for name in selection.biases:
            if name not in rotated and not isinstance(modules[name], _BIASED):
                raise ConfigError(
                    "The bias of this layer cannot be trained", module=name, found=type(modules[name]).__name__,
                    expected="linear, convolution or normalisation layers", hint="Use bias = 'oft_only'.",
                )

    def _register(self, name: str, start: Tensor, build: Callable[[Tensor], Tensor], lengths: Sequence[int]) -> _Built:
        cuts, at = [], 0
        for n in lengths:
            cuts.append((at, n))
            at += n
        self.parameters[name] = nn.Parameter(start)
        self._built[name] = _Built(self.parameters[name], build, cuts)
        return self._built[name]

    def _builder(self, name: str, config: OFTConfig, block: int) -> Callable[[Tensor], Tensor]:
        scale = generator_scale(config, block)
        coefficients = neumann_coefficients(config.num_cayley_neumann_terms) if config.use_cayley_neumann else None

        def build(packed: Tensor) -> Tensor:
            packed = packed * scale if scale != 1 else packed
            if coefficients is None:
                r = CayleyOfPacked.apply(packed, block)
            else:
                r = polynomial(unpack_skew(packed, block), coefficients)
            keep = self._masks.get(name)
            if keep is not None:
                r = torch.where(keep, r, torch.eye(block, dtype=r.dtype, device=r.device))
            return r

        return build

    def config_of(self, name: str) -> OFTConfig:
        """The configuration of the part that the parameter ``name`` belongs to."""
        return self.parts[name.split("/", 1)[0]][1].config

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Part -> its parameters, for per-part learning rates."""
        out: dict[str, list[nn.Parameter]] = {part: [] for part in self.parts}
        for name, p in self.parameters.items():
            out[name.split("/", 1)[0]].append(p)
        return out

    def saved(self) -> list[nn.Parameter]:
        """The parameters of the modules trained whole: values, where all others are differences from the model."""
        return [p for name, p in self.parameters.items() if "/saved/" in name]

    # ---------------------------------------------------------------- one step

    def begin_step(self, step: int = 0) -> None:
        """Project COFT generators (in place, as PEFT does in its forward), draw the block dropout of ``step``, build everything."""
        for name, p in self.parameters.items():
            if "/rotation/" in name:
                self._project_coft_(name, p.data)
                self._masks.pop(name, None)
                dropout = self.config_of(name).module_dropout
                if dropout > 0:
                    self._masks[name] = self._dropout_mask(name, dropout, step).to(p.device)
        for built in self._built.values():
            built.begin(train=True)
        self._active = True

    def finish_backward(self, divisor: float = 1.0) -> None:
        """Gradients of all leaves (divided by ``divisor``, a loss scale) -> ``.grad`` of the packed parameters."""
        for built in self._built.values():
            built.finish(divisor)
        if divisor != 1:
            for name, p in self.parameters.items():
                if "/saved/" in name and p.grad is not None:
                    p.grad /= divisor
        self._active = False

    def abandon_step(self) -> None:
        """Forget a step that was begun: graphs, leaves and gradients."""
        for built in self._built.values():
            built.clear()
        for p in self.parameters.values():
            p.grad = None
        self._masks.clear()
        self._active = False

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Projections that follow the optimizer's step: COFT's, angle cap and spectral clip."""
        for name, p in self.parameters.items():
            if "/rotation/" in name:
                limit_(optimizer, p, partial(self._project_, name))

    def _project_(self, name: str, packed: Tensor) -> None:
        """All limits, in place."""
        config, block = self.config_of(name), self._block(name)
        self._project_coft_(name, packed)
        if config.largest_lam is not None:
            limit_lam_(packed, config.largest_lam / generator_scale(config, block), block)

    @contextmanager
    def evaluation(self, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Forwards inside use the rotations without dropout and without gradients; ``values``: other parameter values (EMA).

        Only between steps. Trained parameters are not touched.
        """
        if self._active:
            raise RuntimeError("evaluation is only possible between two steps")
        swapped: dict[str, Tensor] = {}
        self._masks.clear()
        try:
            with torch.no_grad():
                for name, built in self._built.items():
                    built.begin(train=False, value=self._limited(name, values))
                for name, p in self.parameters.items():
                    if "/saved/" in name and values is not None:
                        swapped[name] = p.data
                        p.data = values[name].to(p.device, p.dtype)
            self._active = True
            yield
        finally:
            self._active = False
            for name, old in swapped.items():
                self.parameters[name].data = old
            for built in self._built.values():
                built.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Forwards inside are the frozen model's own (for matching its predictions)."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    def _block(self, name: str) -> int:
        return int(name.rsplit("/", 1)[1])

    def _dropout_mask(self, name: str, dropout: float, step: int) -> Tensor:
        """True where a block stays rotated, (blocks, 1, 1) on the CPU. A block shared by a whole layer is never dropped."""
        members = self._members[name]
        draw = torch.rand(sum(c.stored for c in members), generator=generator(self.seed, "dropout", name, step))
        single = torch.cat([torch.full((c.stored,), c.stored == 1) for c in members])
        return ((draw >= dropout) | single).view(-1, 1, 1)

    def _coft_limits(self, name: str, device: torch.device) -> Tensor:
        config, members = self.config_of(name), self._members[name]
        return torch.cat([torch.full((c.stored, 1), config.eps / math.sqrt(c.stored)) for c in members]).to(device, self.dtype)

    def _project_coft_(self, name: str, packed: Tensor) -> None:
        config = self.config_of(name)
        if not config.coft:
            return
        limit = self._coft_limits(name, packed.device) / generator_scale(config, self._block(name))
        norm = packed.norm(dim=1, keepdim=True) * math.sqrt(2)
        packed.mul_(torch.where(norm <= limit, torch.ones_like(norm), limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)))

    def _limited(self, name: str, values: Mapping[str, Tensor] | None) -> Tensor:
        """A copy of a parameter (or of its stand-in) with COFT's projection applied."""
        p = self.parameters[name]
        value = (p if values is None else values[name]).detach().to(p.device, p.dtype, copy=True)
        if "/rotation/" in name:
            self._project_coft_(name, value)
        return value

    # ---------------------------------------------------------------- installing

    @contextmanager
    def installed(self) -> Iterator[RotationBank]:
        """The models' adapted layers use the rotations inside; afterwards, also after an exception, they are exactly as before.

        Every parameter of the models is frozen meanwhile.
        """
        if self._installed:
            raise RuntimeError("the bank is already installed")
        flags = [(p, p.requires_grad) for model, _ in self.parts.values() for p in model.parameters()]
        undo: list[tuple[nn.Module, object, Callable, _Slot]] = []
        self._installed = True
        try:
            for p, _ in flags:
                if p.requires_grad:
                    p.requires_grad_(False)
            for slot in self._slots.values():
                before = slot.module.__dict__.get("forward", _MISSING)
                wrapper = self._wrap(slot, slot.module.forward)
                slot.module.__dict__["forward"] = wrapper
                undo.append((slot.module, before, wrapper, slot))
            yield self
        finally:
            for module, before, wrapper, _ in reversed(undo):
                if module.__dict__.get("forward") is not wrapper:
                    continue  # something else wrapped ours meanwhile; without an active step ours only passes on
                if before is _MISSING:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = before
            for p, flag in flags:
                if flag:
                    p.requires_grad_(True)
            self.abandon_step()
            self._installed = False

    def _wrap(self, slot: _Slot, original: Callable) -> Callable:
        if slot.choice is None:
            run = self._saved_forward if slot.saved is not None else self._bias_forward
        elif slot.choice.kind == "conv" and slot.choice.side == "input":
            run = self._conv_forward
        else:
            run = self._linear_forward

        def forward(x: Tensor, *args, **kwargs):
            if not self._active or slot.inside:
                return original(x, *args, **kwargs)
            return run(slot, original, x, *args, **kwargs)

        return forward

    def _linear_forward(self, slot: _Slot, original: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        """Input side: rotate x, then the frozen layer. Output side (also of convolutions): the frozen layer, then rotate."""
        m = _leaf(slot.rotation, x.device)
        if slot.choice.side == "input":
            return self._tail(slot, original(RotateLast.apply(x, m, compute_dtype(x)), *args, **kwargs))
        y = original(x, *args, **kwargs)
        bias = _bias_like(slot.module, y)
        core = y if bias is None else y - bias
        if slot.choice.kind == "conv":
            core = rotate_channels(core, m.to(core.dtype))
        else:
            core = RotateLast.apply(core, m.transpose(-1, -2), core.dtype)
        return self._tail(slot, core, bias, bare=True)

    def _conv_forward(self, slot: _Slot, original: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        module = slot.module
        weight = plain(self.weight_of(module)).to(x.device)
        padding: Sequence[int] = [0] * len(module.kernel_size)
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        elif isinstance(module.padding, str):
            x = F.pad(x, module._reversed_padding_repeated_twice)
        else:
            padding = module.padding
        y = RotatedConv.apply(
            x, weight, _leaf(slot.rotation, x.device), compute_dtype(x), list(module.stride), list(padding), list(module.dilation)
        )
        return self._tail(slot, y, _bias_like(module, y), bare=True)

    def _bias_forward(self, slot: _Slot, original: Callable, x: Tensor, *args, **kwargs) -> Tensor:
        return self._tail(slot, original(x, *args, **kwargs))

    def _saved_forward(self, slot: _Slot, original: Callable, x: Tensor, *args, **kwargs) -> object:
        """The module's own forward with the trained values in place of its parameters, in the parameters' dtypes."""
        places = []
        for key, trained in slot.saved.items():
            owner, _, leaf = key.rpartition(".")
            holder = slot.module.get_submodule(owner)
            places.append((holder, leaf, holder._parameters[leaf], trained))
        slot.inside = True
        try:
            for holder, leaf, frozen, trained in places:
                holder._parameters[leaf] = trained.to(frozen.device, frozen.dtype)
            return original(x, *args, **kwargs)
        finally:
            slot.inside = False
            for holder, leaf, frozen, _ in places:
                holder._parameters[leaf] = frozen

    def _tail(self, slot: _Slot, y: Tensor, bias: Tensor | None = None, bare: bool = False) -> Tensor:
        """Row magnitude and bias. ``bare``: y comes without its frozen bias, which is ``bias``."""
        if slot.scale is not None:
            if not bare:
                bias = _bias_like(slot.module, y)
                y = y if bias is None else y - bias
                bare = True
            y = y * _channels(slot.module, _leaf(slot.scale, y.device).to(y.dtype), y)
        if bare and bias is not None:
            y = y + bias
        if slot.bias is not None:
            y = y + _channels(slot.module, _leaf(slot.bias, y.device).to(y.dtype), y)
        return y

    # ---------------------------------------------------------------- state and export

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all trained parameters on the CPU, exactly as they are."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over values in place. Raises ConfigError if names or shapes differ from this bank's."""
        mine = {n: tuple(p.shape) for n, p in self.parameters.items()}
        theirs = {n: tuple(t.shape) for n, t in state.items()}
        if mine != theirs:
            differing = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            n = differing[0]
            raise ConfigError(
                "The saved parameters are of another selection of layers", found=f"{n}: {theirs.get(n, 'absent')}",
                expected=f"{n}: {mine.get(n, 'absent')}",
            )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state[name])

    def adapter_tensors(self, values: Mapping[str, Tensor] | None = None) -> dict[tuple[str, str], list[Piece]]:
        """(part, module) -> operations on its parameters, in the library's canonical form on the CPU; ``values``: see ``evaluation``.

        Limits are already applied to the numbers. A module trained whole appears once per submodule that owns parameters.
        """
        out: dict[tuple[str, str], list[Piece]] = {}
        for part, (model, selection) in self.parts.items():
            modules = dict(model.named_modules(remove_duplicate=False))
            config = selection.config
            cut: dict[str, dict[str, Tensor]] = {c.name: {} for c in selection.layers}
            for name in (n for n in self._built if n.startswith(part + "/")):
                value = self._limited(name, values).cpu()
                what = name.split("/")[1]
                names = selection.biases if what == "bias" else [c.name for c in self._members[name]]
                for module, (start, length) in zip(names, self._built[name].cuts, strict=True):
                    cut.setdefault(module, {})[what] = value[start : start + length].clone()
            for choice in selection.layers:
                out[part, choice.name] = [Piece(self._rotation_of(choice, config, cut[choice.name]))]
            for name in selection.biases:
                out.setdefault((part, name), []).append(Piece(Diff(cut[name]["bias"].float()), "bias"))
            for name in selection.modules_to_save:
                for key in self._slots[part, name].saved:
                    full = f"{part}/saved/{name}.{key}"
                    owner, _, leaf = f"{name}.{key}".rpartition(".")
                    value = (self.parameters[full] if values is None else values[full]).detach().float().cpu()
                    frozen = plain(getattr(modules[owner], leaf)).float().cpu()
                    out.setdefault((part, owner), []).append(Piece(Diff(value - frozen), leaf))
        return out

    def _rotation_of(self, choice: LayerChoice, config: OFTConfig, values: Mapping[str, Tensor]) -> LayerRotation:
        generator_ = values["rotation"] * generator_scale(config, choice.block)
        scale = values["scale"].exp().float() if "scale" in values else None
        limit = None
        if config.coft:
            norms = (generator_.double().norm(dim=1) * math.sqrt(2)).float()
            limit = Constraint("PEFT >= 0.16: eps / sqrt(blocks), per block", config.eps / math.sqrt(choice.stored), norms)
        side = "in" if choice.side == "input" else "out"
        if choice.transposed:
            side = "out" if side == "in" else "in"
        return LayerRotation(
            side, choice.block, choice.count, "neumann" if config.use_cayley_neumann else "cayley",
            config.num_cayley_neumann_terms, generator=generator_.float().unsqueeze(0), constraint=limit,
            row_scale=None if choice.transposed else scale, col_scale=scale if choice.transposed else None,
        )


_BIASED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)


def plain_weight(module: nn.Module) -> Tensor:
    """``module.weight`` if it is a plain floating-point tensor of the layer's shape; else ConfigError."""
    weight = module.weight
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    if not weight.is_floating_point() or tuple(weight.shape) != shape:
        raise ConfigError(
            "The weight of this convolution is packed, so it cannot be rotated", found=f"{weight.dtype} {tuple(weight.shape)}",
            expected=f"floating point {shape}", hint="Train linear layers only, or use a model that is not quantised.",
        )
    return weight


def _leaf(place: tuple[_Built, int], device: torch.device) -> Tensor:
    built, i = place
    return built.leaves[i].to(device)


def _channels(module: nn.Module, v: Tensor, y: Tensor) -> Tensor:
    """A vector over output channels, shaped for y: channels are dimension 1 of convolutions and group norms, else the last ones."""
    if isinstance(module, nn.LayerNorm):
        return v.view(module.normalized_shape)
    if isinstance(module, nn.Linear) or not isinstance(module, _BIASED):
        return v
    return v.view(-1, *[1] * (y.ndim - 2))


def _bias_like(module: nn.Module, y: Tensor) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else _channels(module, plain(bias).to(y.device, y.dtype), y)
