"""reForge's LoRA engine: as Forge's, on patchers with lists."""

import lora_files
from modules import shared

available_network_aliases: dict = {}
loaded_networks: list = []


def load_lora_state_dict(filename):
    return lora_files.files[filename.removeprefix("/lora/").removesuffix(".safetensors")]


def load_lora_for_models(unet, clip, lora, strength_model, strength_clip, filename="default"):
    unet, clip = unet.clone(), clip.clone()
    unet.add_patches({key: (delta,) for key, delta in lora.items()}, strength_model)
    return unet, clip


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    available_network_aliases.update(lora_files.aliases())
    model = shared.sd_model
    targets = [[available_network_aliases[n].filename, u, t] for n, u, t in zip(names, unet_multipliers, te_multipliers, strict=False)]
    if str(targets) == model.current_lora_hash:
        return
    model.current_lora_hash = str(targets)
    objects = model.forge_objects
    objects.unet, objects.clip = model.forge_objects_original.unet, model.forge_objects_original.clip
    for file, strength, te in targets:
        state = load_lora_state_dict(file)
        objects.unet, objects.clip = load_lora_for_models(objects.unet, objects.clip, state, strength, te, filename=file)
    model.forge_objects_after_applying_lora = objects.shallow_copy()
