"""Automatic1111: networks in ``networks.loaded_networks``, whose modules give each layer a difference to add.

The host asks a layer's modules in the order of that list when the layer runs and the list has changed. Each gets the weight
as the ones before left it, so rotations and LoRAs act in the order of the prompt. Only with fp8 weights does every module
get the stored half-precision weight and does only the last one's answer stay; then one more network at the end says the
whole.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import networks
import torch
from modules import devices, prompt_parser, sd_hijack, shared
from torch import Tensor, nn

from ...oft_core import Patch
from ...oft_core.training import ConfigError
from ..changes import Change, changes
from . import objects, training
from .contract import OURS, Part, Trainee, Wanted

#: What the host patches at all, beside torch's own attention.
_KINDS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
_QKV = ("_q_proj", "_k_proj", "_v_proj")
_OLD_METHOD = "With the old method of Settings, Compatibility, Lora/Networks, several files are added, not composed."


class Place(NamedTuple):
    """A parameter: the module and attribute that hold it, and what the host calls its layer."""

    module: nn.Module
    leaf: str
    layer: nn.Module

    @property
    def parameter(self) -> Tensor:
        return getattr(self.module, self.leaf)


Places = dict[str, Place]
_places: weakref.WeakKeyDictionary[Any, dict[str, Places]] = weakref.WeakKeyDictionary()


#: Every name of the host that this file uses, module -> names; beside `contract.COMMON`.
TOUCHES = {
    "networks": ("assign_network_names_to_compvis_modules", "loaded_networks", "network_apply_weights"),
    "modules.devices": ("autocast", "device", "dtype", "dtype_vae"),
    "modules.prompt_parser": ("SdConditioning",),
    "modules.sd_hijack": ("model_hijack", "undo_optimizations"),
    "modules.shared": ("opts", "sd_model"),
}


class A1111:
    title = "Automatic1111"

    def __init__(self) -> None:
        #: What was put on last, for the host forgets it before every picture.
        self.made: dict[str, Network] = {}
        self.model: Any = lambda: None

    def parts(self, sd_model: Any) -> list[Part]:
        return [
            Part(name, objects.WORDS[name], {key: tuple(place.parameter.shape) for key, place in found.items()})
            for name, found in places(sd_model).items()
        ]

    def put(self, sd_model: Any, wanted: Sequence[Wanted]) -> list[str]:
        if self.model() is not sd_model:
            self.made, self.model = {}, weakref.ref(sd_model)
        instead = {one.tag.name for one in wanted if one.instead}
        others = [
            (net, name) for net in networks.loaded_networks
            if not objects.ours(net.name) and (name := getattr(net, "mentioned_name", None)) not in instead
        ]
        found = places(sd_model)
        self.made = {one.identity: self.made.get(one.identity) or Network(one, found) for one in wanted}
        nets = [
            self.made[one.identity] if isinstance(one, Wanted) else one for one in objects.in_order(others, wanted)
        ]
        if wanted and any(getattr(p.module, "fp16_weight", None) is not None for part in found.values() for p in part.values()):
            nets.append(Whole(nets))
        networks.loaded_networks[:] = nets
        notes = [note for net in self.made.values() for note in net.notes]
        if wanted and getattr(shared.opts, "lora_functional", False):
            notes.append(_OLD_METHOD)
        return notes

    def chosen(self) -> Any:
        return shared.sd_model

    def trainee(self, sd_model: Any) -> Trainee:
        kind = training.kind_of(sd_model)
        net = sd_model.model.diffusion_model
        training.check_input(net.in_channels)
        if getattr(sd_model, "lowvram", False):
            raise ConfigError(
                "Training needs the whole model on the device", found="--medvram or --lowvram", expected="a web UI started without them"
            )
        if any(getattr(m, "fp16_weight", None) is not None for m in net.modules()):
            raise ConfigError("Weights in fp8 cannot be trained here", found="Settings, FP8 weight", expected="Disable")

        def call(x: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            with devices.autocast():
                dtype = next(net.parameters()).dtype
                given = {"y": cond["vector"].to(dtype)} if "vector" in cond else {}
                return net(x.to(dtype), timesteps, context=cond["crossattn"].to(dtype), **given)

        def text(prompt: str, width: int, height: int) -> dict[str, Tensor]:
            with devices.autocast():
                made = sd_model.get_learned_conditioning(prompt_parser.SdConditioning([prompt], width=width, height=height))
            return dict(made) if isinstance(made, dict) else {"crossattn": made}

        def encode(picture: Tensor) -> Tensor:
            with devices.autocast():
                found = sd_model.encode_first_stage(picture.to(devices.device, devices.dtype_vae) * 2 - 1)
                return sd_model.get_first_stage_encoding(found).float()

        def decode(latent: Tensor) -> Tensor:
            with devices.autocast():
                return sd_model.decode_first_stage(latent.to(devices.device, devices.dtype_vae)).float() / 2 + 0.5

        return Trainee(
            kind, net, "model.diffusion_model.", getattr(sd_model, "parameterization", "eps"), sd_model.alphas_cumprod.detach().cpu().double(),
            torch.device(devices.device), training.file_of(sd_model), call, text, encode, decode, lambda: _trained(sd_model, net),
            lambda: None,
        )


@contextlib.contextmanager
def _trained(sd_model: Any, net: nn.Module) -> Iterator[None]:
    """Without networks, and with the host's plain attention: its faster ones work in place or only forward."""
    before = list(networks.loaded_networks)
    networks.loaded_networks.clear()
    for module in net.modules():
        if getattr(module, "network_layer_name", None) is not None and isinstance(module, (*_KINDS, nn.MultiheadAttention)):
            networks.network_apply_weights(module)  # the host would do so in the first forward
    sd_hijack.undo_optimizations()
    try:
        with training.own_checkpoints_off(net):
            yield
    finally:
        sd_hijack.model_hijack.apply_optimizations()
        networks.loaded_networks[:] = before


def places(sd_model: Any) -> dict[str, Places]:
    """Part -> parameter key, spelt as in a checkpoint -> where it is, for all that the host patches."""
    if sd_model not in _places:
        if not hasattr(sd_model, "network_layer_mapping"):
            networks.assign_network_names_to_compvis_modules(sd_model)
        _places[sd_model] = {
            "model": dict(_below(sd_model.model, "model.")),
            "clip": dict(pair for root, prefix in _text_encoders(sd_model) for pair in _below(root, prefix)),
        }
    return _places[sd_model]


def _text_encoders(sd_model: Any) -> Iterable[tuple[nn.Module, str]]:
    if getattr(sd_model, "is_sdxl", False):
        for i, embedder in enumerate(sd_model.conditioner.embedders):
            if hasattr(embedder, "wrapped"):
                yield embedder.wrapped, f"conditioner.embedders.{i}."
    else:
        encoder = sd_model.cond_stage_model
        yield getattr(encoder, "wrapped", encoder), "cond_stage_model."


def _below(root: nn.Module, prefix: str) -> Iterable[tuple[str, Place]]:
    for name, module in root.named_modules():
        if getattr(module, "network_layer_name", None) is None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            held = {"in_proj_weight": module, "out_proj.weight": module.out_proj, "out_proj.bias": module.out_proj}
        elif isinstance(module, _KINDS) and not _in_attention(root, name):
            held = {"weight": module, "bias": module}
        else:
            continue
        for path, holder in held.items():
            place = Place(holder, path.rpartition(".")[2], module)
            if isinstance(getattr(holder, place.leaf, None), Tensor):
                yield f"{prefix}{name}.{path}", place


def _in_attention(root: nn.Module, name: str) -> bool:
    """Whether a module is the ``out_proj`` of torch's attention, which never runs on its own."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and isinstance(root.get_submodule(parent), nn.MultiheadAttention)


class Network:
    """One file among the host's networks: the attributes that the host reads of each."""

    te_multiplier = unet_multiplier = 1.0
    network_on_disk = mentioned_name = dyn_dim = mtime = None

    def __init__(self, one: Wanted, found: dict[str, Places]):
        self.name = one.identity
        self.modules: dict[str, Any] = {}
        self.bundle_embeddings: dict = {}
        self.notes: list[str] = []
        by_layer: dict[str, dict[Place, list[Change]]] = {}
        for part, patches in one.patches.items():
            at = found[part]
            # The host keeps what a layer becomes, and asks again only when the prompt names other files.
            for change in changes(patches, lambda patch, at=at: _measured(at[patch.key], patch), again=False):
                place = at[change.patch.key]
                by_layer.setdefault(place.layer.network_layer_name, {}).setdefault(place, []).append(change)
        for layer, made in by_layer.items():
            module = next(iter(made)).layer
            if isinstance(module, nn.MultiheadAttention):
                joint = Joint([c for place, found_ in made.items() if place.leaf == "in_proj_weight" for c in found_], module)
                self.modules |= {layer + name: Third(joint, i) for i, name in enumerate(_QKV)}
                self.modules[layer + "_out_proj"] = Turn(module.out_proj, made)
            elif isinstance(module, nn.Conv2d) and module.weight.shape[1] == 9:
                # The host takes every answer for this layer for one of four channels, and widens it.
                self.notes.append(f"OFT {one.tag.name}: the input layer of inpainting models is left as it is in this web UI.")
            else:
                self.modules[layer] = Turn(module, made)


def _difference(made: Sequence[Change], parameter: Tensor) -> Tensor:
    """What these changes make of a parameter, less the parameter; float32."""
    before = parameter.detach().float()
    work = before.clone()
    for change in made:
        change.apply_(work if change.patch.rows is None else work.narrow(0, *change.patch.rows))
    return work.sub_(before)


class Turn:
    """A layer's answer: differences of its weight and bias to add."""

    def __init__(self, module: nn.Module, made: dict[Place, list[Change]]):
        self.module = module
        own = {place.leaf: found for place, found in made.items() if place.module is module}
        self.weight, self.bias = own.get("weight", []), own.get("bias", [])

    def calc_updown(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return _difference(self.weight, target), _difference(self.bias, self.module.bias) if self.bias else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The host's old method: what the layer's difference makes of its input. Norms it leaves as they are."""
        weight, bias = self.calc_updown(self.module.weight)
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if isinstance(self.module, nn.Conv2d):
            return y + self.module._conv_forward(x, weight, bias)
        return y + nn.functional.linear(x, weight, bias) if isinstance(self.module, nn.Linear) else y


class Joint:
    """The joint weight of torch's attention, of which the host asks for the queries', keys' and values' rows in turn."""

    def __init__(self, made: Sequence[Change], module: nn.MultiheadAttention):
        self.made, self.module, self.thirds = made, module, None

    def third(self, i: int) -> Tensor:
        if i == 0 or self.thirds is None:
            self.thirds = _difference(self.made, self.module.in_proj_weight).chunk(3, 0)
        mine = self.thirds[i]
        if i == 2:
            self.thirds = None
        return mine


class Third:
    def __init__(self, joint: Joint, i: int):
        self.joint, self.i = joint, i

    def calc_updown(self, target: Tensor) -> tuple[Tensor, None]:
        return self.joint.third(self.i), None


class Whole:
    """The last network where weights are fp8: for each layer of ours, what all networks before it make together."""

    te_multiplier = unet_multiplier = 1.0
    network_on_disk = mentioned_name = dyn_dim = mtime = None

    def __init__(self, before: Sequence[Any]):
        self.name = OURS + "whole"
        self.bundle_embeddings: dict = {}
        turned = {k for net in before if isinstance(net, Network) for k, module in net.modules.items() if isinstance(module, Turn)}
        self.modules = {layer: Sum([net.modules[layer] for net in before if layer in net.modules]) for layer in turned}


class Sum:
    """Several modules' answers, each to what the ones before made of the weight."""

    def __init__(self, modules: Sequence[Any]):
        self.modules = modules

    def calc_updown(self, target: Tensor) -> tuple[Tensor, Tensor | None]:
        work, bias = target.detach().float(), None
        for module in self.modules:
            updown, more = module.calc_updown(work)
            work = work + updown.to(work)
            bias = more if bias is None else bias if more is None else bias + more
        return work - target.float(), bias


def _measured(place: Place, patch: Patch) -> Tensor:
    """What a patch needs of the layer's weight without any network, see `Patch.measure`."""
    kept = getattr(place.layer, "network_weights_backup", None)
    if isinstance(kept, tuple):
        kept = kept[0 if place.leaf == "in_proj_weight" else 1]
    half = getattr(place.module, "fp16_weight", None)
    weight = half if half is not None else place.parameter if kept is None else kept
    return patch.measure(weight.detach().float().cpu())
