"""Forge (2024 to 2025): patches in ``unet.lora_patches``, merged in float32 or asked for in every step.

Forge merges anew whenever the list of identifiers has changed, so an identifier holds everything that makes a difference.
Weights in fp8, NF4 and GGUF are Forge's to unpack and pack again; ours is what happens between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import networks
import torch
from backend import memory_management
from backend.args import dynamic_args
from backend.patcher import lora as backend_lora
from backend.utils import get_attr

from ...oft_core import Patch
from ..changes import Change, changes
from . import objects
from .contract import Part, Trainee, Wanted

#: The type of our patches among Forge's.
KIND = "oft_rotation"
_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def _turn(weight: torch.Tensor, strength: float, change: Change) -> torch.Tensor:
    """Forge's own signature; the change knows its strength. In place too: of a slice Forge drops what is returned."""
    return change.apply_(weight)


#: Every name of the host that this file uses, module -> names; beside `contract.COMMON`.
TOUCHES = {
    "backend.args": ("dynamic_args",),
    "backend.attention": ("attention_pytorch",),
    "backend.memory_management": ("cast_to_device", "get_torch_device", "load_models_gpu"),
    "backend.nn.unet": ("attention_function",),
    "backend.operations_bnb": ("functional_dequantize_4bit",),
    "backend.operations_gguf": ("dequantize_tensor",),
    "backend.patcher.lora": ("extra_weight_calculators", "LoraLoader", "merge_lora_to_weight"),
    "backend.patcher.base": ("ModelPatcher",),
    "backend.utils": ("get_attr",),
    "modules.prompt_parser": ("SdConditioning",),
    "modules.sd_models": ("forge_model_reload",),
    "modules.shared": ("sd_model",),
    "networks": ("available_network_aliases", "load_networks"),
}


class Forge:
    """payload: makes the host's patch of a change; None: Forge's own way."""

    title = "Forge"

    def __init__(self, payload: Callable[[Change], Any] | None = None) -> None:
        self.payload = payload
        if payload is None:
            self.payload = lambda change: (KIND, change)
            backend_lora.extra_weight_calculators[KIND] = _turn

    def parts(self, sd_model: Any) -> list[Part]:
        return objects.parts(sd_model, real_shape)

    def put(self, sd_model: Any, wanted: Sequence[Wanted]) -> list[str]:
        after = sd_model.forge_objects_after_applying_lora
        online = dynamic_args.get("online_lora", False) and after.unet.model.storage_dtype not in _PLAIN
        instead = {file for one in wanted if one.instead and (file := objects.lora_file(networks, one.tag.name))}
        wanted = objects.with_files(networks, wanted)
        made = {}
        for part, patcher in objects.patchers_of(after.unet, after.clip).items():
            known = patcher.lora_patches
            acting = [one for one in wanted if any(at.value for _, at in one.patches.get(part, ()))]
            others = [(key, key[0]) for key in known if not objects.ours(key[0]) and key[0] not in instead]
            order = objects.in_order(others, acting)
            keys = [_identifier(one, online) if isinstance(one, Wanted) else one for one in order]
            if keys == list(known):
                continue
            copy = patcher.clone()
            copy.lora_patches = {}
            for key, one in zip(keys, order, strict=True):
                if key in known:
                    copy.lora_patches[key] = known[key]
                else:
                    self._add(copy, one, part, online)
            made[part] = copy
        objects.replace(sd_model, made)
        return []

    def _add(self, patcher: Any, one: Wanted, part: str, online: bool) -> None:
        made = changes(one.patches[part], lambda patch: measured(patcher, patch), again=online)
        joined: dict[str, list] = {}
        for layer in objects.layers(made, self.payload):
            patcher.add_patches(filename=one.identity, patches=layer, online_mode=online)
            # The host keeps one dictionary for an identifier.
            for key, found in patcher.lora_patches[_identifier(one, online)].items():
                joined.setdefault(key, []).extend(found)
        patcher.lora_patches[_identifier(one, online)] = joined

    def chosen(self) -> Any:
        from . import forge_training

        return forge_training.chosen()

    def trainee(self, sd_model: Any) -> Trainee:
        from . import forge_training

        return forge_training.trainee(sd_model)


def _identifier(one: Wanted, online: bool) -> tuple[str, float, float, bool]:
    """As ``ModelPatcher.add_patches`` makes it; the strengths stand in the name."""
    return one.identity, 1.0, 1.0, online


def real_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """A parameter's shape as a matrix, also where it is packed (NF4, GGUF)."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return tuple(state.shape)
    return tuple(getattr(parameter, "real_shape", None) or parameter.shape)


def measured(patcher: Any, patch: Patch) -> torch.Tensor:
    """What a patch needs of the layer's weight without any patch, see `Patch.measure`."""
    weight = patcher.lora_loader.backup.get(patch.key)
    weight = get_attr(patcher.model, patch.key) if weight is None else weight
    if hasattr(weight, "bnb_quantized"):
        from backend.operations_bnb import functional_dequantize_4bit

        weight = functional_dequantize_4bit(weight)
    elif hasattr(weight, "gguf_cls"):
        from backend.operations_gguf import dequantize_tensor

        weight = dequantize_tensor(weight)
    weight = memory_management.cast_to_device(weight, torch.device("cpu"), torch.float32)
    return patch.measure(weight)
