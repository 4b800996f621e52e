"""What makes a model's weights other weights: an adapter at a strength, a fine-tuned model, a LoRA."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from .adapter import Binding, Patch
from .constraint import Strength
from .errors import FormatError, ModelMismatch, ShapeError
from .formats.write_beside import BaseWeights
from .merge import read_header
from .names import NameIndex

#: Parameter key -> gives the changed parameter, float32 in the model's shape; in the model's order.
Changed = Mapping[str, Callable[[], Tensor]]


def of_adapter(binding: Binding, index: NameIndex, base: BaseWeights, strength: Strength) -> Changed:
    """What an adapter makes of a model's parameters, its block strengths included."""
    by_key: dict[str, list[tuple[Patch, Strength]]] = {}
    for patch, at in binding.strengths(index, strength):
        if at.value != 0:
            by_key.setdefault(patch.key, []).append((patch, at))

    def turned(key: str) -> Tensor:
        weight = base(key).to(torch.float32, copy=True)
        measured = [patch.measure(weight) for patch, _ in by_key[key]]
        for (patch, at), of_base in zip(by_key[key], measured, strict=True):
            patch.apply_(weight, at, measured=of_base)
        return weight

    return {key: lambda key=key: turned(key) for key in by_key}


def of_model(index: NameIndex, base: BaseWeights, other: NameIndex, tuned: BaseWeights) -> Changed:
    """The parameters in which a fine-tuned model differs from its base, bit by bit. Raises ModelMismatch for another model.

    Parameters that only one of the two has are left alone (a checkpoint against its UNet): they must share the layers' names.
    """
    shared = [key for key in index.shapes if key in other.shapes]
    if not shared:
        raise ModelMismatch(
            "The two models have no parameter in common", found=f"names as {next(iter(other.shapes), 'none')}",
            expected=f"names as {next(iter(index.shapes), 'none')}", hint="Bring both into one layout (checkpoint, UNet, diffusers) first.",
        )
    for key in shared:
        if tuple(index.shapes[key]) != tuple(other.shapes[key]):
            raise ShapeError("The two models differ in shape", module=key, found=tuple(other.shapes[key]), expected=tuple(index.shapes[key]))
    return {key: lambda key=key: tuned(key).float() for key in shared if not torch.equal(base(key).float(), tuned(key).float())}


_LORA = re.compile(
    r"(?P<module>.+?)\.(?:(?P<up>lora_up\.weight|lora_B(?:\.default)?\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight)"
    r"|(?P<down>lora_down\.weight|lora_A(?:\.default)?\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight)|(?P<alpha>alpha))$"
)


def holds_lora(path: str | os.PathLike) -> bool:
    """Whether a safetensors file holds a LoRA. Raises FileError for a damaged or other file."""
    return any((m := _LORA.match(key)) and m["up"] for key in read_header(path)[0])


def of_lora(path: str | os.PathLike, index: NameIndex, base: BaseWeights) -> Changed:
    """What a plain LoRA (kohya's, PEFT's or diffusers' names) makes of a model's weights at strength 1.

    Raises FormatError for other adapters and for keys beside the LoRA, ShapeError for one of another model, ModelMismatch if layers
    find no place.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            match = _LORA.match(key)
            if match is None:
                strange.append(key)
                continue
            kind = next(k for k in ("up", "down", "alpha") if match[k])
            parts.setdefault(match["module"], {})[kind] = file.get_tensor(key).float()
    if strange or not all({"up", "down"} <= p.keys() for p in parts.values()):
        found = strange[0] if strange else next(m for m, p in parts.items() if not {"up", "down"} <= p.keys())
        raise FormatError("This is not a plain LoRA", file=path, found=found, expected="an 'up' and a 'down' matrix for every layer")
    deltas: dict[str, list[tuple[tuple[int, int] | None, Tensor]]] = {}
    lost = []
    for module, p in parts.items():
        delta = _product(module, p, path)
        targets = index.resolve(module)
        if not targets:
            lost.append(module)
        at = 0
        for target in targets:
            height = target.rows[1] if target.rows else index.shapes[target.key][0]
            piece = delta[at : at + height]
            at += height
            deltas.setdefault(target.key, []).append((target.rows, torch.cat(piece.chunk(2)[::-1]) if target.swap_halves else piece))
    if lost:
        raise ModelMismatch(
            "Not all layers of this LoRA have a place in the model", file=path, module=lost[0],
            found=f"{len(parts) - len(lost)} of {len(parts)} layers", expected="all of them",
        )

    def added(key: str) -> Tensor:
        weight = base(key).to(torch.float32, copy=True)
        for rows, delta in deltas[key]:
            view = weight if rows is None else weight.narrow(0, *rows)
            if delta.numel() != view.numel():
                raise ShapeError("The LoRA does not fit the layer", file=path, module=key, found=tuple(delta.shape), expected=tuple(view.shape))
            view += delta.reshape(view.shape)
        return weight

    return {key: lambda key=key: added(key) for key in deltas}


def _product(module: str, part: dict[str, Tensor], path: str | os.PathLike) -> Tensor:
    up, down = part["up"], part["down"]
    rank = down.shape[0]
    if up.ndim < 2 or down.ndim < 2 or up.flatten(1).shape[1] != rank:
        raise ShapeError("The two matrices of a LoRA do not fit", file=path, module=module, found=f"{tuple(up.shape)}, {tuple(down.shape)}")
    scale = float(part["alpha"]) / rank if "alpha" in part else 1.0
    return scale * (up.flatten(1) @ down.flatten(1))
