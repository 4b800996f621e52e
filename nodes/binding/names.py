"""Names of a loaded model's weights, in every spelling that ComfyUI and files have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ...oft_core import NameIndex, ShapeError, Target
from . import layers


class HostIndex(NameIndex):
    """`NameIndex` over a loaded model, then ComfyUI's own LoRA key tables for families it does not know."""

    def __init__(self, shapes: Mapping[str, Any], aliases: Mapping[str, Target]):
        super().__init__(shapes)
        self._aliases = aliases

    def resolve(self, module: str, clip: str = "te1") -> list[Target]:
        found = super().resolve(module, clip)
        if found:
            return found
        target = self._aliases.get(_plain(module))
        return [target] if target is not None else []


def _plain(name: str) -> str:
    """One spelling for dotted and underscored names, and for kohya's OFT prefix."""
    name = name.replace(".", "_")
    return "lora_unet_" + name[len("oft_unet_") :] if name.startswith("oft_unet_") else name


def _aliases(table: Mapping[str, Any]) -> dict[str, Target]:
    """ComfyUI's key table as targets: name -> key, (key, (dim, start, length)) or (key, slice, function)."""
    out: dict[str, Target] = {}
    for name, to in table.items():
        key, piece, function = (*to, None, None)[:3] if isinstance(to, tuple) else (to, None, None)
        if piece is not None and piece[0] != 0:
            continue
        if function is not None and function is not comfy.utils.swap_scale_shift:
            continue
        rows = None if piece is None else (int(piece[1]), int(piece[2]))
        out.setdefault(_plain(name), Target(key=key, rows=rows, swap_halves=function is not None))
    return out


def shapes_of(patcher: Any) -> dict[str, tuple[int, ...]]:
    """Parameter key -> shape, as the layers mean it where they hold packed bytes."""
    shapes = {}
    for key, value in layers.tensors_of(patcher.model, patcher.model_state_dict()):
        shape = tuple(value.shape)
        # Numbers of one byte too: blocks with common scales are padded to whole blocks.
        packed = key.endswith(".weight") and (value.dtype.itemsize == 1 or not value.is_floating_point())
        shapes[key] = layers.logical_shape(patcher.model, key, shape) if packed else shape
    return shapes


@dataclass(frozen=True)
class Side:
    """One of the two things that a file can patch: the diffusion model or the text encoders."""

    name: str
    words: str
    owner: Any
    patcher: Any
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, Target]


def model_side(model: Any) -> Side:
    """The diffusion model of a MODEL."""
    return Side(
        "model",
        "Diffusion model",
        model,
        model,
        shapes_of(model),
        _aliases(comfy.lora.model_lora_keys_unet(model.model, {})),
    )


def _clip_side(clip: Any) -> Side:
    table = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    return Side("clip", "Text encoders", clip, clip.patcher, shapes_of(clip.patcher), _aliases(table))


def text_side(patcher: Any) -> Side:
    """Text encoders known by their patcher alone, as hooks are given them."""
    aliases = _aliases(comfy.lora.model_lora_keys_clip(patcher.model, {}))
    return Side("clip", "Text encoders", patcher, patcher, shapes_of(patcher), aliases)


def bare_side(model: Any) -> Side:
    """The side of a diffusion or text encoder module without its patcher; a loaded one's patcher is looked up."""
    loaded = (entry.model for entry in comfy.model_management.current_loaded_models)
    cpu = torch.device("cpu")
    patcher = next((p for p in loaded if p is not None and p.model is model), None)
    patcher = patcher or comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    return model_side(patcher) if isinstance(model, comfy.model_base.BaseModel) else text_side(patcher)


def sides_of(model: Any | None, clip: Any | None) -> list[Side]:
    """What there is to patch, the diffusion model first; either may be None."""
    sides = [model_side(model)] if model is not None else []
    return sides if clip is None else [*sides, _clip_side(clip)]


def names_of(sides: list[Side]) -> tuple[dict[str, tuple[int, ...]], dict[str, Target]]:
    """All parameters and all of ComfyUI's names; where two sides share a name, it is the first one's."""
    shapes = {key: shape for side in reversed(sides) for key, shape in side.shapes.items()}
    aliases = {name: target for side in reversed(sides) for name, target in side.aliases.items()}
    return shapes, aliases


def index_of(model: Any | None, clip: Any | None) -> HostIndex:
    """The names of a MODEL's and a CLIP's weights together; either may be None."""
    return HostIndex(*names_of(sides_of(model, clip)))


def own_weights(model: Any | None, clip: Any | None) -> Callable[[str], torch.Tensor]:
    """Parameter key -> the model's own value of it, float32, without the patches that ComfyUI has merged into it.

    Asking raises ShapeError for a weight that its layer hides.
    """
    sides = sides_of(model, clip)

    def get(key: str) -> torch.Tensor:
        side = next(side for side in sides if key in side.shapes)
        value = layers.plain_weight(side.patcher, key)
        if value is None:
            raise ShapeError(
                "The model's own weight is stored in a form that cannot be read", module=key,
                hint="Use a model file that is not quantised.",
            )
        return value

    return get
