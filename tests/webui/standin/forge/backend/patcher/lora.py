"""Merging in float32 whenever the list of identifiers has changed; or in every step, in the weight's own type."""

import torch

from .. import utils

extra_weight_calculators: dict = {}


@torch.inference_mode()
def merge_lora_to_weight(patches, weight, key="online", computation_dtype=torch.float32):
    back = weight.dtype
    weight = weight.clone() if back == computation_dtype else weight.to(computation_dtype)
    for strength, value, strength_model, offset, _function in patches:
        whole, part = weight, weight if offset is None else weight.narrow(*offset)
        part *= strength_model
        kind, payload = value if len(value) == 2 else ("diff", value)
        if kind == "diff":
            part += strength * payload[0]
            weight = part
        else:
            weight = extra_weight_calculators[kind](part, strength, payload)
        weight = whole if offset is not None else weight  # of a slice, what comes back is dropped
    return weight.to(back)


class LoraLoader:
    def __init__(self, model):
        self.model, self.backup, self.online, self.loaded = model, {}, [], "[]"
        self.merges = 0

    @torch.inference_mode()
    def refresh(self, lora_patches):
        wanted = str(list(lora_patches))
        if wanted == self.loaded:
            return
        for layer in self.online:
            del layer.forge_online_loras
        for key, weight in self.backup.items():
            utils.set_attr(self.model, key, weight)
        self.online, self.backup = [], {}
        together: dict = {}
        for (_, _, _, online), patches in lora_patches.items():
            for key, found in patches.items():
                together.setdefault((key, online), []).extend(found)
        for (key, online), patches in together.items():
            weight = utils.get_attr(self.model, key)
            if online:
                parent, _, leaf = key.rpartition(".")
                layer = utils.get_attr(self.model, parent)
                layer.forge_online_loras = {**getattr(layer, "forge_online_loras", {}), leaf: patches}
                self.online.append(layer) if layer not in self.online else None
                continue
            self.backup[key] = weight
            self.merges += 1
            utils.set_attr(self.model, key, torch.nn.Parameter(merge_lora_to_weight(patches, weight), requires_grad=False))
        self.loaded = wanted
