"""Neo's LoRA engine: as reForge's, with a word about online patches."""

import lora_files
from backend.args import dynamic_args
from modules import shared

available_network_aliases: dict = {}
loaded_networks: list = []


def load_lora_state_dict(filename):
    return lora_files.files[filename.removeprefix("/lora/").removesuffix(".safetensors")]


def load_lora_for_models(unet, clip, lora, strength_model, strength_clip, filename="default", online_mode=False):
    unet, clip = unet.clone(), clip.clone()
    unet.add_patches({k: (delta,) for k, delta in lora.items()}, strength_model, filename=filename, online_mode=online_mode)
    return unet, clip


def load_networks(names, te_multipliers=None, unet_multipliers=None, dyn_dims=None):
    available_network_aliases.update(lora_files.aliases())
    model, online = shared.sd_model, dynamic_args.online_lora
    targets = [[available_network_aliases[n].filename, u, t, online] for n, u, t in zip(names, unet_multipliers, te_multipliers, strict=False)]
    if str(targets) == model.current_lora_hash:
        return
    model.current_lora_hash = str(targets)
    objects = model.forge_objects
    objects.unet, objects.clip = model.forge_objects_original.unet, model.forge_objects_original.clip
    for file, strength, te, mode in targets:
        state = load_lora_state_dict(file)
        objects.unet, objects.clip = load_lora_for_models(
            objects.unet, objects.clip, state, strength, te, filename=file, online_mode=mode
        )
    model.forge_objects_after_applying_lora = objects.shallow_copy()
