"""Forge's LoRA engine: anew from the original when the list of files and strengths changes."""

import lora_files
from backend.args import dynamic_args
from modules import shared

available_network_aliases: dict = {}
loaded_networks: list = []


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    available_network_aliases.update(lora_files.aliases())
    model, online = shared.sd_model, dynamic_args["online_lora"]
    targets = [[available_network_aliases[n].filename, u, t, online] for n, u, t in zip(names, unet_multipliers, te_multipliers, strict=False)]
    if str(targets) == model.current_lora_hash:
        return
    model.current_lora_hash = str(targets)
    objects = model.forge_objects
    objects.unet, objects.clip = model.forge_objects_original.unet, model.forge_objects_original.clip
    for name, (file, strength, _, _) in zip(names, targets, strict=False):
        objects.unet = objects.unet.clone()
        layers = {key: (delta,) for key, delta in lora_files.files[name].items()}
        objects.unet.add_patches(filename=file, patches=layers, strength_patch=strength, online_mode=online)
    model.forge_objects_after_applying_lora = objects.shallow_copy()
