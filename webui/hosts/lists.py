"""Hosts whose patchers keep, for each parameter, a list of patches in the order of application (reForge, newer Neo).

A list does not say which file a patch is of. So what was there before ours is kept, and where one of ours comes before a
LoRA, the LoRAs are put on anew.
"""

from __future__ import annotations

import ast
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import networks
import torch

from ...oft_core import Patch
from ..changes import Change, changes
from . import objects
from .contract import Wanted

TOUCHES = {"networks": ("available_network_aliases", "load_lora_for_models", "load_lora_state_dict")}


def put(
    sd_model: Any,
    wanted: Sequence[Wanted],
    payload: Callable[[Change], Any],
    measured: Callable[[Any, Patch], torch.Tensor],
    online: bool = False,
) -> None:
    """As `Host.put`. measured: `Patch.measure` of a patch's unpatched weight, given the patcher.   online: in every step."""
    after = sd_model.forge_objects_after_applying_lora
    # The host makes these objects anew when its LoRAs change, and ours are gone with the old ones.
    state, clean = getattr(after, "oft_state", None), getattr(after, "oft_clean", (after.unet, after.clip))
    asked = (tuple((one.identity, one.after, one.instead) for one in wanted), online)
    if state == asked or (state is None and not wanted):
        return
    targets = _targets(sd_model)
    instead = {file for one in wanted if one.instead and (file := objects.lora_file(networks, one.tag.name))}
    left = [(target, target[0]) for target in targets if target[0] not in instead]
    order = objects.in_order(left, objects.with_files(networks, wanted))
    count = len(left)
    if len(left) == len(targets) and not any(isinstance(one, Wanted) for one in order[:count]):
        (unet, clip), rest = clean, order[count:]
    else:
        original = sd_model.forge_objects_original
        (unet, clip), rest = (original.unet, original.clip), order
    # Also where only something is taken away, the host must see that the weights are others.
    unet, clip = unet.clone(), clip.clone()
    for one in rest:
        if isinstance(one, Wanted):
            _add(objects.patchers_of(unet, clip), one, payload, measured, online)
        else:
            unet, clip = _lora(unet, clip, one)
    unet.patches_uuid, clip.patcher.patches_uuid = uuid.uuid4(), uuid.uuid4()
    for there in (after, sd_model.forge_objects):
        there.unet, there.clip = unet, clip
    after.oft_state, after.oft_clean = asked, clean


def _add(patchers: dict[str, Any], one: Wanted, payload, measured, online: bool) -> None:
    more = {"online_mode": True} if online else {}
    for part, patcher in patchers.items():
        made = changes(one.patches.get(part, ()), lambda patch, of=patcher: measured(of, patch), again=True)
        for layer in objects.layers(made, payload):
            patcher.add_patches(patches=layer, **more)


def _lora(unet: Any, clip: Any, target: Sequence) -> tuple[Any, Any]:
    """One of the host's LoRA targets, put on as the host does."""
    file, strength_model, strength_clip, *online = target
    more = {"online_mode": online[0]} if online else {}
    state = networks.load_lora_state_dict(file)
    return networks.load_lora_for_models(unet, clip, state, strength_model, strength_clip, filename=file, **more)


def _targets(sd_model: Any) -> list[list]:
    """The LoRAs that the host has put on a model, as it notes them itself: lists that begin with the file."""
    try:
        found = ast.literal_eval(getattr(sd_model, "current_lora_hash", None) or "[]")
    except (ValueError, SyntaxError):
        return []
    return [list(target) for target in found] if isinstance(found, list) else []
