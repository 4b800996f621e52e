"""Compare our name index with ComfyUI's own key maps. Runs by itself: python names_oracle.py COMFYUI_FOLDER
REPOSITORY

Builds the full models on the meta device (shapes only) and checks that every alias that this ComfyUI knows for a
parameter of the model leads, in our pack, to the same parameter, the same rows and the same exchange of halves.
Later versions add aliases. Our own index, which the command line uses too, need not know them: the pack then finds
them in ComfyUI's table. But it must not lead one elsewhere. Prints a JSON report with how many it knows; exit status
1 on any difference.
"""

import importlib
import json
import os
import sys
import types

host, repository = sys.argv[1:3]
sys.path[0:1] = [host]
sys.argv = ["main.py", "--cpu"]

import comfy.options

comfy.options.enable_args_parsing()

import comfy.diffusers_convert
import comfy.ldm.flux.model
import comfy.lora
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models as models
import comfy.text_encoders.flux
import comfy.text_encoders.sd2_clip
import comfy.text_encoders.sd3_clip
import torch

# As a package of another name: the repository's folder `nodes` must not hide ComfyUI's module of that name, and the
# pack's own entry point would make folders in the host.
pack = sys.modules["pack"] = types.ModuleType("pack")
pack.__path__ = [repository]
host_names = importlib.import_module("pack.nodes.binding.names")
NameIndex, component = (getattr(importlib.import_module("pack.oft_core.names"), n) for n in ("NameIndex", "component"))

META = torch.device("meta")
UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
SD1_SHAPE = {
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
SDXL_SHAPE = {
    "model_channels": 320,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
}
SDXL_TINY = {  # one resnet a level and no middle block
    **SDXL_SHAPE,
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 2, 5],
    "transformer_depth_output": [0, 0, 2, 2, 5, 5],
    "transformer_depth_middle": -2,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:  # newer hosts
    FLUX["txt_ids_dims"] = []


def sd3(depth, **more):
    width = depth * 64
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": width}}
    return {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": depth,
        "input_size": None,
        "adm_in_channels": 2048,
        "context_embedder_config": embedder,
        "num_patches": 192 * 192,
        "pos_embed_max_size": 192,
        "pos_embed_scaling_factor": None,
        "x_block_self_attn_layers": [],
        **more,
    }


DIFFUSION = {
    "sd1": (models.SD15, {**UNET, **SD1_SHAPE, "use_linear_in_transformer": False, "context_dim": 768}),
    "sd2": (models.SD20, {**UNET, **SD1_SHAPE, "use_linear_in_transformer": True, "context_dim": 1024}),
    "sdxl": (models.SDXL, {**UNET, **SDXL_SHAPE}),
    "sdxl without middle": (models.KOALA_700M, {**UNET, **SDXL_TINY}),
    "sd3": (models.SD3, sd3(24)),
    "sd3.5 large": (models.SD3, sd3(38, qk_norm="rms")),
    "sd3.5 medium": (models.SD3, sd3(24, qk_norm="rms", x_block_self_attn_layers=list(range(13)))),
    "flux": (models.Flux, FLUX),
}
PIXART = {
    "depth": 28,
    "input_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "num_heads": 16,
}
AURAFLOW = {"max_seq": 4096, "cond_seq_dim": 2048, "n_double_layers": 4, "n_layers": 36}
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "cap_feat_dim": 2560,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "qk_norm": True,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
}
QWEN = {"image_model": "qwen_image", "in_channels": 16, "num_layers": 4}
LTX = {"image_model": "ltxv"}
WAN = {
    "image_model": "wan2.1",
    "dim": 1536,
    "out_dim": 16,
    "num_heads": 12,
    "ffn_dim": 8960,
    "num_layers": 4,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
    "model_type": "t2v",
}
DIFFUSION |= {
    "pixart": (models.PixArtSigma, PIXART),
    "auraflow": (models.AuraFlow, AURAFLOW),
    "z-image": (models.ZImage, Z_IMAGE),
    "qwen": (models.QwenImage, QWEN),
    "ltx": (models.LTXV, LTX),
    "wan": (models.WAN21_T2V, WAN),
}
SD3_CLIP = comfy.text_encoders.sd3_clip.SD3ClipModel
ON_META = {"device": "meta", "dtype": torch.float32}
TEXT = {
    "sd1": lambda: comfy.sd1_clip.SD1ClipModel(**ON_META),
    "sd2": lambda: comfy.text_encoders.sd2_clip.SD2ClipModel(**ON_META),
    "sdxl": lambda: comfy.sdxl_clip.SDXLClipModel(**ON_META),
    "sd3": lambda: SD3_CLIP(**ON_META),
    "sd3 without t5": lambda: SD3_CLIP(t5=False, **ON_META),
    "sd3 without clip_g": lambda: SD3_CLIP(clip_g=False, **ON_META),
    "sd3 only t5": lambda: SD3_CLIP(clip_l=False, clip_g=False, **ON_META),
    "flux": lambda: comfy.text_encoders.flux.FluxClipModel(**ON_META),
}


def wanted(value):
    """ComfyUI's key map value as (key, rows, swap)."""
    if isinstance(value, str):
        return value, None, False
    key, span = value[0], value[1]
    if span is not None and span[0] != 0:
        raise ValueError(f"not rows: {value}")
    return key, None if span is None else tuple(span[1:]), len(value) > 2


def compare(key_map, state_dict, rename=lambda key: key, part=None):
    """Counts of compared aliases and the list of differences; `rename`: how the keys are called in the model that we
    index. part: key -> component, given for ComfyUI's live models, where the pack has ComfyUI's table as well."""
    shapes = {rename(key): tuple(value.shape) for key, value in state_dict.items()}
    index = NameIndex(shapes)
    with_table = host_names.HostIndex(shapes, host_names._aliases(key_map)) if part is not None else None
    compared, known, differences = 0, 0, []
    for alias, value in key_map.items():
        key, rows, swap = wanted(value)
        if key not in state_dict:
            continue  # ComfyUI's tables name every module that some version of the family has
        compared += 1
        expected = [(rename(key), rows, swap)]
        got = resolved(index, alias)
        known += got == expected
        if got and got != expected:
            differences.append([alias, expected, got])
        elif with_table is not None and resolved(with_table, alias) != expected:
            differences.append([alias, expected, resolved(with_table, alias)])
        if part is not None and component(alias) != part(key):
            differences.append([alias, part(key), component(alias)])
    return {
        "family": index.family,
        "parameters": len(state_dict),
        "aliases": compared,
        "known": known,
        "differences": differences,
    }


def resolved(index, alias):
    return [(t.key, t.rows, t.swap_halves) for t in index.resolve(alias)]


def encoder_of(key):
    return {"clip_l": "te1", "clip_h": "te1", "clip_g": "te2", "t5xxl": "te3"}[key.split(".")[0]]


def open_clip_rows():
    """ComfyUI's conversion to open_clip, on numbered values: our rows of the fused matrix must hold the
    same numbers."""
    layers, width = 3, 8
    hf = {}
    for n in range(layers):
        for name, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width, width),
            "self_attn.v_proj": (width, width),
            "self_attn.out_proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            hf[f"transformer.text_model.encoder.layers.{n}.{name}.weight"] = torch.randn(shape)
            hf[f"transformer.text_model.encoder.layers.{n}.{name}.bias"] = torch.randn(shape[0])
    saved = comfy.diffusers_convert.convert_text_enc_state_dict_v20(dict(hf))
    differences, compared = [], 0
    for prefix, part in (("conditioner.embedders.1.model.", "te2"), ("cond_stage_model.model.", "te")):
        index = NameIndex({prefix + key: tuple(value.shape) for key, value in saved.items()})
        for key, value in hf.items():
            if not key.endswith(".weight"):
                continue
            module = key.removeprefix("transformer.").removesuffix(".weight")
            alias = f"lora_{part}_" + module.replace(".", "_")
            compared += 1
            targets = index.resolve(alias)
            if len(targets) != 1:
                differences.append([alias, key, [str(t) for t in targets]])
                continue
            found = saved[targets[0].key.removeprefix(prefix)]
            if targets[0].rows:
                found = found.narrow(0, *targets[0].rows)
            if not torch.equal(found, value):
                differences.append([alias, key, str(targets[0])])
    return {"aliases": compared, "known": compared - len(differences), "differences": differences}


report = {}
for name, (family, config) in DIFFUSION.items():
    settings = family(config)
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "", device=META)
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    live = {k: v for k, v in model.state_dict().items() if k.startswith("diffusion_model.")}
    report[name] = compare(key_map, live, part=lambda key: "unet")
    for prefix in ("model.diffusion_model.", ""):  # a checkpoint, and a file of the diffusion model alone
        rename = lambda key, prefix=prefix: prefix + key.removeprefix("diffusion_model.")
        report[f"{name} as {prefix or 'bare'}"] = compare(key_map, live, rename)
for name, build in TEXT.items():
    model = build()
    key_map = comfy.lora.model_lora_keys_clip(model, {})
    live = model.state_dict()
    report[f"{name} text encoders"] = compare(key_map, live, part=encoder_of)
    report[f"{name} text encoders as text_encoders."] = compare(
        key_map, live, lambda key: "text_encoders." + key
    )
report["open_clip"] = open_clip_rows()

bad = {name: entry["differences"] for name, entry in report.items() if entry["differences"]}
for entry in report.values():
    entry["differences"] = len(entry["differences"])
print(json.dumps({"report": report, "bad": {name: found[:20] for name, found in bad.items()}}, indent=1))
sys.stdout.flush()
os._exit(1 if bad else 0)  # nothing to tear down; some hosts keep threads
