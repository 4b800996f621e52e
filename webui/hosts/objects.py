"""What Forge and its relatives share: models as patchers in ``forge_objects``, patched copies put in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ...oft_core import Patch
from ..changes import Change
from .contract import OURS, Part, Wanted

WORDS = {"model": "Diffusion model", "clip": "Text encoders"}

_shapes: WeakKeyDictionary[Any, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


def parts(sd_model: Any, shape: Callable[[Any], tuple[int, ...]]) -> list[Part]:
    """Both parts of a loaded model. shape: of a parameter, unpacked where it is stored in another."""
    out = []
    objects = sd_model.forge_objects_original
    for name, patcher in patchers_of(objects.unet, objects.clip).items():
        model = patcher.model
        if model not in _shapes:
            _shapes[model] = {key: shape(parameter) for key, parameter in model.named_parameters()}
        out.append(Part(name, WORDS[name], _shapes[model]))
    return out


def patchers_of(unet: Any, clip: Any) -> dict[str, Any]:
    """The patchers by part."""
    return {"model": unet, "clip": clip.patcher}


def replace(sd_model: Any, made: Mapping[str, Any]) -> None:
    """Have the next encoding and sampling use these patchers, by part, and those after it until the LoRAs change."""
    for objects in (sd_model.forge_objects_after_applying_lora, sd_model.forge_objects):
        if "model" in made:
            objects.unet = made["model"]
        if "clip" in made:
            objects.clip = objects.clip.clone()
            objects.clip.patcher = made["clip"]


def patch_key(patch: Patch) -> str | tuple[str, tuple[int, int, int]]:
    """How these hosts name a parameter, or rows of it: (dimension, start, length)."""
    return patch.key if patch.rows is None else (patch.key, (0, *patch.rows))


def layers(made: Iterable[Change], payload: Callable[[Change], Any]) -> list[dict[Any, Any]]:
    """Changes as dictionaries for ``add_patches``: more than one only where a file changes the same rows twice."""
    out: list[dict[Any, Any]] = []
    for change in made:
        key = patch_key(change.patch)
        free = next((layer for layer in out if key not in layer), None)
        if free is None:
            free = {}
            out.append(free)
        free[key] = payload(change)
    return out


def ours(identity: object) -> bool:
    return str(identity).startswith(OURS)


def lora_file(networks: Any, name: str) -> str | None:
    """The file that the host's own LoRA engine takes a tag's name for."""
    found = networks.available_network_aliases.get(name)
    return None if found is None else found.filename


def with_files(networks: Any, wanted: Iterable[Wanted]) -> list[Wanted]:
    """The same, with files for the names of the LoRAs that stand before each."""
    return [
        dataclasses.replace(one, after=tuple(f for name in one.after if (f := lora_file(networks, name)))) for one in wanted
    ]


def in_order(others: Sequence[tuple[Any, str]], wanted: Sequence[Wanted]) -> list[Any]:
    """LoRAs and our own in the order of the prompt.

    others: (anything, its file) of each LoRA in the host's order. One that stands before one of ours, or before a LoRA
    that does, comes first.
    """
    out: list[Any] = []
    left = list(others)
    for one in wanted:
        last = max((i for i, (_, file) in enumerate(left) if file in one.after), default=-1)
        out += [other for other, _ in left[: last + 1]]
        left = left[last + 1 :]
        out.append(one)
    return out + [other for other, _ in left]
