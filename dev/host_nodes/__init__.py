"""Test-only ComfyUI nodes: tiny models of every family, and a window into patched weights."""

from __future__ import annotations

import json
import os
import re

import comfy.lora
import comfy.model_management
import comfy.utils
import folder_paths
from safetensors.torch import save_file

from . import families


class TinyCheckpoint:
    """Stands in for a checkpoint loader: random model, text encoders and VAE of one family."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "family": (list(families.IN_MEMORY),),
                "full_depth": ("BOOLEAN", {"default": False}),
                "layers": ("INT", {"default": 3, "min": 3, "max": 32}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1}),
            }
        }

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "_for_testing/tiny"

    def load(self, family, full_depth, layers, seed):
        return (
            families.make_model(family, full_depth, seed),
            families.make_clip(family, layers, seed),
            families.make_vae(family, seed),
        )


class TinySaveWeights:
    """Loads a model the normal way, then saves its patched weights so that a test can compare numbers.

    Names are the host's own; those of a text encoder get the prefix ``clip.``
    """

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pattern": ("STRING", {"default": ".*"}),
                "filename": ("STRING", {"default": "weights"}),
            },
            "optional": {"model": ("MODEL",), "clip": ("CLIP",)},
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    CATEGORY = "_for_testing/tiny"

    def save(self, pattern, filename, model=None, clip=None):
        chosen = {}
        for prefix, patcher in (("", model), ("clip.", clip.patcher if clip is not None else None)):
            if patcher is None:
                continue
            comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
            for name, tensor in patcher.model.state_dict().items():
                if re.search(pattern, prefix + name):
                    chosen[prefix + name] = tensor.detach().cpu().clone().contiguous()
        if not chosen:
            raise ValueError(f"no weight name matches {pattern!r}")
        path = os.path.join(folder_paths.get_output_directory(), os.path.basename(filename) + ".safetensors")
        save_file(chosen, path)
        return {"ui": {"text": [json.dumps({"path": path, "count": len(chosen)})]}}


class TinyPacked:
    """Stands in for a GGUF loader: a tiny model whose linear weights are packed as in a GGUF file."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (list(families.IN_MEMORY),)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "_for_testing/tiny"

    def load(self, family):
        from . import gguf_layers

        return (gguf_layers.make_model(families, family)[0],)


class TinyFailure:
    """A model that raises while it samples: at the given step, behind the first layer whose name fits."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "step": ("INT", {"default": 2, "min": 0, "max": 1000}),
                "layer": ("STRING", {"default": "."}),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "_for_testing/tiny"

    def patch(self, model, step, layer):
        name, module = next((n, m) for n, m in model.model.named_modules() if re.search(layer, n))

        def fail(*_):
            raise RuntimeError(f"on purpose: step {step}, behind {name}")

        def wrapper(apply_model, call):
            now = call["timestep"][0] <= call["c"]["transformer_options"]["sample_sigmas"][step]
            hook = module.register_forward_hook(fail) if now else None
            try:
                return apply_model(call["input"], call["timestep"], **call["c"])
            finally:
                if hook is not None:
                    hook.remove()

        clone = model.clone()
        clone.set_model_unet_function_wrapper(wrapper)
        return (clone,)


class TinyLoraStack:
    """Stands in for other packs' LoRA stackers: a list of (name, strength_model, strength_clip) from JSON."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"entries": ("STRING", {"default": "[]", "multiline": True})}}

    RETURN_TYPES = ("LORA_STACK",)
    FUNCTION = "make"
    CATEGORY = "_for_testing/tiny"

    def make(self, entries):
        return ([tuple(entry) for entry in json.loads(entries)],)


class TinyShowLoraStack:
    """Shows a LORA_STACK as JSON."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"lora_stack": ("LORA_STACK",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "show"
    CATEGORY = "_for_testing/tiny"

    def show(self, lora_stack):
        assert all(isinstance(entry, tuple) for entry in lora_stack)
        return {"ui": {"text": [json.dumps(lora_stack)]}}


class TinyLoraByNames:
    """Stands in for packs with block weights: asks ComfyUI for patches by names and adds some of them itself."""

    @classmethod
    def INPUT_TYPES(cls):
        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05})
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "lora_name": (folder_paths.get_filename_list("loras"),),
                "strength_model": strength,
                "strength_clip": strength,
                "without": ("STRING", {"default": "", "tooltip": "Leaves out keys with this text in them."}),
            }
        }

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "_for_testing/tiny"

    def load(self, model, clip, lora_name, strength_model, strength_clip, without):
        tensors = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", lora_name))
        names = comfy.lora.model_lora_keys_unet(model.model, {})
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
        patches = comfy.lora.load_lora(tensors, names)
        if without:
            patches = {key: patch for key, patch in patches.items() if without not in str(key)}
        model, clip = model.clone(), clip.clone()
        model.add_patches(patches, strength_model)
        clip.add_patches(patches, strength_clip)
        return (model, clip)


NODE_CLASS_MAPPINGS = {
    "Tiny_Checkpoint": TinyCheckpoint,
    "Tiny_SaveWeights": TinySaveWeights,
    "Tiny_Packed": TinyPacked,
    "Tiny_Failure": TinyFailure,
    "Tiny_LoraStack": TinyLoraStack,
    "Tiny_ShowLoraStack": TinyShowLoraStack,
    "Tiny_LoraByNames": TinyLoraByNames,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Tiny_Packed": "Tiny Packed Model (test)",
    "Tiny_Failure": "Failing Model (test)",
    "Tiny_LoraStack": "LoRA Stack (test)",
    "Tiny_ShowLoraStack": "Show LoRA Stack (test)",
    "Tiny_LoraByNames": "LoRA by names (test)",
    "Tiny_Checkpoint": "Tiny Checkpoint (test)",
    "Tiny_SaveWeights": "Save Weights (test)",
}
