"""reForge: ComfyUI's patchers and weight adapters under ``ldm_patched``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ldm_patched.modules import utils
from ldm_patched.modules.weight_adapter import WeightAdapterBase

from ...oft_core import Patch
from . import adapters, lists, objects, training
from .contract import Part, Trainee, Wanted

#: Every name of the host that this file uses, module -> names; beside `contract.COMMON`.
TOUCHES = {
    **lists.TOUCHES,
    "ldm_patched.modules.utils": ("get_attr",),
    "ldm_patched.modules.weight_adapter": ("WeightAdapterBase",),
    "ldm_patched.modules.model_patcher": ("ModelPatcher",),
}


class ReForge:
    title = "reForge"

    def __init__(self) -> None:
        self.payload = adapters.payload(WeightAdapterBase)

    def parts(self, sd_model: Any) -> list[Part]:
        return objects.parts(sd_model, lambda parameter: tuple(parameter.shape))

    def put(self, sd_model: Any, wanted: Sequence[Wanted]) -> list[str]:
        lists.put(sd_model, wanted, self.payload, measured)
        return []

    def chosen(self) -> Any:
        raise training.not_here(self.title)

    def trainee(self, sd_model: Any) -> Trainee:
        raise training.not_here(self.title)


def measured(patcher: Any, patch: Patch) -> torch.Tensor:
    """What a patch needs of the layer's weight without any patch, see `Patch.measure`."""
    kept = patcher.backup.get(patch.key)
    weight = utils.get_attr(patcher.model, patch.key) if kept is None else getattr(kept, "weight", kept)
    return patch.measure(weight.float().cpu())
