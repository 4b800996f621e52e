"""Test-only ComfyUI nodes: tiny models of every family, and a window into patched weights."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import comfy.model_management
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
        # The folder is linked into the host; the stand-in lies with the tests that share it.
        scripts = Path(__file__).resolve().parents[2] / "tests" / "host" / "scripts"
        if str(scripts) not in sys.path:
            sys.path.append(str(scripts))
        import gguf_layers

        return (gguf_layers.make_model(families, family)[0],)


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


NODE_CLASS_MAPPINGS = {
    "Tiny_Checkpoint": TinyCheckpoint,
    "Tiny_SaveWeights": TinySaveWeights,
    "Tiny_Packed": TinyPacked,
    "Tiny_LoraStack": TinyLoraStack,
    "Tiny_ShowLoraStack": TinyShowLoraStack,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Tiny_Packed": "Tiny Packed Model (test)",
    "Tiny_LoraStack": "LoRA Stack (test)",
    "Tiny_ShowLoraStack": "Show LoRA Stack (test)",
    "Tiny_Checkpoint": "Tiny Checkpoint (test)",
    "Tiny_SaveWeights": "Save Weights (test)",
}
