"""Forge Neo: ComfyUI's weight adapters in Forge's house; older ones with Forge's ``lora_patches``, newer ones with lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from backend import memory_management, utils
from backend.args import dynamic_args
from modules_forge.packages.comfy.weight_adapter import WeightAdapterBase

from ...oft_core import AdapterError, Patch
from . import adapters, forge, lists, objects, training
from .contract import Part, Trainee, Wanted

#: Every name of the host that this file uses, module -> names; beside `contract.COMMON`.
TOUCHES = {
    **lists.TOUCHES,
    "backend.args": ("dynamic_args",),
    "backend.memory_management": ("cast_to_device",),
    "backend.patcher.base": ("ModelPatcher",),
    "backend.utils": ("get_attr",),
    "modules_forge.packages.comfy.weight_adapter": ("WeightAdapterBase",),
}


class Neo:
    title = "Forge Neo"

    def __init__(self) -> None:
        self.payload = adapters.payload(WeightAdapterBase)

    def parts(self, sd_model: Any) -> list[Part]:
        return objects.parts(sd_model, forge.real_shape)

    def put(self, sd_model: Any, wanted: Sequence[Wanted]) -> list[str]:
        if wanted and _said("nunchaku"):
            raise AdapterError(
                "This model's layers take LoRAs only", found="a nunchaku model", expected="weights that can be turned",
                hint="Use another version of the model.",
            )
        if hasattr(sd_model.forge_objects_original.unet, "lora_patches"):
            return forge.Forge(self.payload).put(sd_model, wanted)
        # As the host decides for its LoRAs.
        ops = str(_said("ops") or "")
        online = bool(_said("online_lora")) and not (ops.startswith("Mixed") or ops.endswith("FP8"))
        lists.put(sd_model, wanted, self.payload, measured, online)
        return []

    def chosen(self) -> Any:
        raise training.not_here(self.title)

    def trainee(self, sd_model: Any) -> Trainee:
        raise training.not_here(self.title)


def _said(name: str) -> Any:
    """One of the host's arguments, which are a dictionary in some versions and an object in others."""
    return dynamic_args.get(name) if isinstance(dynamic_args, dict) else getattr(dynamic_args, name, None)


def measured(patcher: Any, patch: Patch) -> torch.Tensor:
    """What a patch needs of the layer's weight without any patch, see `Patch.measure`."""
    kept = patcher.backup.get(patch.key)
    weight = utils.get_attr(patcher.model, patch.key) if kept is None else getattr(kept, "weight", kept)
    dequantize = getattr(weight, "dequantize", None)
    if dequantize is not None and not isinstance(weight, torch.nn.Parameter):
        weight = dequantize()
    weight = memory_management.cast_to_device(weight, torch.device("cpu"), torch.float32)
    return patch.measure(weight)
