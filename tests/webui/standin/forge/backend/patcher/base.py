from .lora import LoraLoader


class ModelPatcher:
    def __init__(self, model):
        self.model, self.lora_patches = model, {}
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)
        self.lora_loader = model.lora_loader

    def clone(self):
        other = ModelPatcher(self.model)
        other.lora_patches = dict(self.lora_patches)
        return other

    def add_patches(self, *, filename, patches, strength_patch=1.0, strength_model=1.0, online_mode=False):
        known = dict(self.model.named_parameters())
        mine: dict = {}
        for key, value in patches.items():
            name, offset, *function = (key, None) if isinstance(key, str) else key
            if name in known:
                entry = [strength_patch, value, strength_model, offset, function[0] if function else None]
                mine.setdefault(name, []).append(entry)
        self.lora_patches[filename, strength_patch, strength_model, online_mode] = mine
        return set(patches)
