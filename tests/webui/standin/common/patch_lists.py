"""ComfyUI's scheme: for each parameter a list of patches, put on when the patcher's number is another."""

import functools
import uuid

import torch


class WeightAdapterBase:
    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=None, original_weight=None
    ):
        raise NotImplementedError


def get_attr(model, key):
    return functools.reduce(getattr, key.split("."), model)


def set_attr(model, key, value):
    parent, _, leaf = key.rpartition(".")
    setattr(get_attr(model, parent) if parent else model, leaf, value)


def calculate_weight(patches, weight, key):
    for strength, value, _strength_model, offset, function, *_ in patches:
        whole, part = weight, weight if offset is None else weight.narrow(*offset)
        if isinstance(value, WeightAdapterBase):
            made = value.calculate_weight(part, key, strength, 1.0, offset, function, torch.float32, None)
        else:
            part += strength * value[0]
            made = part
        weight = whole if offset is not None else made
    return weight


class ModelPatcher:
    def __init__(self, model):
        self.model, self.patches, self.patches_uuid = model, {}, uuid.uuid4()
        self.backup = model.__dict__.setdefault("backup", {})

    def clone(self):
        other = type(self)(self.model)
        other.patches, other.patches_uuid = {k: list(v) for k, v in self.patches.items()}, self.patches_uuid
        return other

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0, **more):
        known = self.model.state_dict()
        for key, value in patches.items():
            name, offset, *function = (key, None) if isinstance(key, str) else key
            if name in known:
                entry = (strength_patch, value, strength_model, offset, function[0] if function else None, *more.values())
                self.patches.setdefault(name, []).append(entry)
        self.patches_uuid = uuid.uuid4()
        return list(patches)

    @torch.inference_mode()
    def load(self):
        """Have the model's weights be this patcher's."""
        if self.model.__dict__.get("current_uuid") == self.patches_uuid:
            return
        for key, weight in self.backup.items():
            set_attr(self.model, key, weight)
        self.backup.clear()
        for key, patches in self.patches.items():
            weight = get_attr(self.model, key)
            self.backup[key] = weight
            turned = calculate_weight(patches, weight.float().clone(), key).to(weight.dtype)
            set_attr(self.model, key, torch.nn.Parameter(turned, requires_grad=False))
        self.model.__dict__["current_uuid"] = self.patches_uuid
