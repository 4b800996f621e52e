"""Tiny random-weight models of every supported family, made from ComfyUI's own classes.

Two kinds exist, because stock loaders recognise a family partly by its widths:

* stock files (`STOCK`): as small as the loader nodes accept, written to disk by ``dev/tiny_models.py``;
* in-memory models (`IN_MEMORY`): far narrower, handed out by the test node ``Tiny_Checkpoint``. With
  ``full_depth`` the UNet families and Flux have exactly the layer names of the real model.

All weights depend only on the tensor's name and the seed, never on the order of creation.
"""

from __future__ import annotations

import math
import zlib

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models as supported
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.text_encoders.flux
import comfy.text_encoders.sd2_clip
import comfy.text_encoders.sd3_clip
import torch

_UNET = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
_SD1 = {**_UNET, "adm_in_channels": None, "use_linear_in_transformer": False, "context_dim": 768}
_SD2 = {**_UNET, "adm_in_channels": None, "use_linear_in_transformer": True, "context_dim": 1024}
_SDXL = {
    **_UNET,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
}
_TWO_LEVELS = {
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
_FULL_SD = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
_FULL_SDXL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}


def _mmdit(depth: int, **extra) -> dict:
    # ComfyUI derives the width from the depth: 64 channels a block, one head a block.
    return {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": depth,
        "input_size": None,
        "adm_in_channels": 2048,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": 64 * depth},
        },
        "num_patches": 64 * 64,
        "pos_embed_max_size": 64,
        "pos_embed_scaling_factor": None,
        "x_block_self_attn_layers": [],
        **extra,
    }


def _flux(double: int, single: int) -> dict:
    return {
        "image_model": "flux",
        "guidance_embed": True,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 64,
        "num_heads": 2,
        "axes_dim": [8, 12, 12],
        "mlp_ratio": 4.0,
        "depth": double,
        "depth_single_blocks": single,
        "theta": 10000,
        "qkv_bias": True,
    }


_SD35 = {"qk_norm": "rms", "x_block_self_attn_layers": [0]}

# name -> (class, config) that the stock UNETLoader / CheckpointLoaderSimple recognise by itself
STOCK = {
    "tiny_sd15": (supported.SD15, {**_SD1, **_TWO_LEVELS, "model_channels": 320, "channel_mult": [1, 1]}),
    "tiny_sd2": (supported.SD20, {**_SD2, **_TWO_LEVELS, "model_channels": 320, "channel_mult": [1, 1]}),
    # The KOALA layout is the SDXL variant with the fewest layers that detection knows.
    "tiny_sdxl": (
        supported.KOALA_700M,
        {
            **_SDXL,
            "model_channels": 320,
            "num_res_blocks": [1, 1, 1],
            "channel_mult": [1, 1, 1],
            "transformer_depth": [0, 2, 5],
            "transformer_depth_output": [0, 0, 0, 0, 1, 1],
            "transformer_depth_middle": -2,
        },
    ),
    "tiny_sd3": (supported.SD3, _mmdit(2)),
    "tiny_sd35": (supported.SD3, _mmdit(2, **_SD35)),
}

# family -> (class, short config, full-depth config or None, overrides set after construction)
IN_MEMORY = {
    "sd15": (supported.SD15, {**_SD1, **_TWO_LEVELS}, {**_SD1, **_FULL_SD}, {"num_heads": 4}),
    "sd2": (
        supported.SD20,
        {**_SD2, **_TWO_LEVELS},
        {**_SD2, **_FULL_SD},
        {"num_head_channels": 32},
    ),
    "sdxl": (
        supported.SDXL,
        {**_SDXL, **_TWO_LEVELS, "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]},
        {**_SDXL, **_FULL_SDXL},
        {"num_head_channels": 32},
    ),
    "sd3": (supported.SD3, _mmdit(2), None, {}),
    "sd35": (supported.SD3, _mmdit(2, **_SD35), None, {}),
    "flux": (supported.Flux, _flux(2, 2), _flux(19, 38), {}),
}
LATENT_CHANNELS = {"sd15": 4, "sd2": 4, "sdxl": 4, "sd3": 16, "sd35": 16, "flux": 16}
_TAESD_SCALE = {
    "sd15": 0.18215,
    "sd2": 0.18215,
    "sdxl": 0.13025,
    "sd3": 1.5305,
    "sd35": 1.5305,
    "flux": 0.3611,
}
_TAESD_SHIFT = {"sd3": 0.0609, "sd35": 0.0609, "flux": 0.1159}


@torch.no_grad()
def fill_(name: str, tensor: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Fill one float tensor in place: norm scales near 1, biases near 0, matrices N(0, 1/fan_in)."""
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) + seed) & 0x7FFFFFFF)
    if tensor.ndim <= 1:
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(0.01 * noise if name.endswith("bias") else 1.0 + 0.02 * noise)
    elif name.endswith("text_projection.weight") and tensor.shape[0] == tensor.shape[1]:
        tensor.copy_(torch.eye(tensor.shape[0]))
    elif tensor.ndim == 2 and name.endswith(("embedding.weight", "shared.weight")):
        # Tables are the largest tensors and only need to be varied: repeat a tile of rows.
        scale = 0.02 if "position" in name else 0.5
        tile = torch.randn((min(1021, tensor.shape[0]), tensor.shape[1]), generator=generator) * scale
        for start in range(0, tensor.shape[0], tile.shape[0]):
            part = tensor[start : start + tile.shape[0]]
            part.copy_(tile[: part.shape[0]])
    else:
        fan_in = tensor[0].numel()
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in))
    return tensor


def random_state(
    module: torch.nn.Module, dtype: torch.dtype = torch.float16, seed: int = 0, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """A filled state dict with the names and shapes of `module` (which may live on the meta device)."""
    state = {}
    for name, tensor in module.state_dict().items():
        if torch.is_floating_point(tensor):
            state[prefix + name] = fill_(name, torch.empty(tensor.shape, dtype=torch.float32), seed).to(dtype)
        elif tensor.is_meta:
            # The only integer tensors in these families are position counters.
            state[prefix + name] = torch.arange(tensor.numel()).reshape(tensor.shape).to(tensor.dtype)
        else:
            state[prefix + name] = tensor.clone()
    return state


def fill_module_(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill every float tensor of a live module in place (ComfyUI's layers start uninitialised)."""
    for name, tensor in module.state_dict().items():
        if torch.is_floating_point(tensor):
            fill_(name, tensor, seed)


def _base_model(
    cls: type, config: dict, overrides: dict, device: torch.device | str, dtype: torch.dtype = torch.float32
):
    conf = cls(dict(config))
    conf.set_inference_dtype(dtype, None)
    conf.unet_config.update(overrides)
    return conf.get_model({}, "", device=device)


def stock_unet_state(name: str, seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    """fp16 state dict of one of `STOCK`, with `prefix` before every name."""
    cls, config = STOCK[name]
    model = _base_model(cls, config, {}, torch.device("meta"))
    return random_state(model.diffusion_model, seed=seed, prefix=prefix)


def taesd_state(family: str, seed: int = 0, prefix: str = "") -> dict[str, torch.Tensor]:
    """fp32 state dict of a tiny autoencoder in the layout that VAELoader recognises.

    The weights are designed rather than random, so that pictures are smooth colour fields inside the visible
    range and differences between latents stay visible: every latent channel is a colour direction, the
    three up and down steps blur, and the residual branches only add a little texture. Positive and negative
    parts of a channel travel in two channels of their own, since there is a ReLU behind every block.
    """
    latents = LATENT_CHANNELS[family]
    with torch.device("meta"):
        model = comfy.taesd.taesd.TAESD(latent_channels=latents)
    state = random_state(model, torch.float32, seed)
    for name, tensor in state.items():
        if ".conv." in name:
            tensor.mul_(0.1)
        elif name.startswith("taesd_"):
            tensor.zero_()
    colour = fill_("colour directions", torch.empty(3, latents), seed)
    colour *= 0.2 / colour.norm(dim=1, keepdim=True)
    blur = torch.tensor([1.0, 2.0, 1.0]) / 4
    for name in [f"taesd_encoder.{i}.weight" for i in (2, 6, 10)] + [
        f"taesd_decoder.{i}.weight" for i in (7, 12, 17)
    ]:
        state[name][range(64), range(64)] = torch.outer(blur, blur)
    signs = torch.cat([torch.eye(latents), -torch.eye(latents)])  # (2 latents, latents)
    state["taesd_decoder.1.weight"][: 2 * latents, :, 1, 1] = signs
    state["taesd_decoder.19.weight"][:, : 2 * latents, 1, 1] = colour @ signs.T
    state["taesd_decoder.19.bias"].fill_(0.5)
    to_latent = signs @ torch.linalg.pinv(colour)  # (2 latents, 3)
    state["taesd_encoder.0.weight"][: 2 * latents, :, 1, 1] = to_latent
    state["taesd_encoder.0.bias"][: 2 * latents] = -0.5 * to_latent.sum(1)
    state["taesd_encoder.14.weight"][:, : 2 * latents, 1, 1] = signs.T
    state["vae_scale"] = torch.tensor(_TAESD_SCALE[family])
    state["vae_shift"] = torch.tensor(_TAESD_SHIFT.get(family, 0.0))
    return {prefix + name: tensor for name, tensor in state.items()}


def config_of(family: str, full_depth: bool = False) -> tuple[type, dict, dict]:
    """ComfyUI's class, its config and the overrides for a model of `IN_MEMORY`, as this host wants them."""
    cls, short, full, overrides = IN_MEMORY[family]
    if full_depth and full is None:
        raise ValueError(
            f"{family}: width follows depth in this family, so there is no tiny full-depth model"
        )
    config = dict(full if full_depth else short)
    if "num_res_blocks" in config:
        config.setdefault("model_channels", 32)
    if family == "flux":
        from comfy.ldm.flux.model import FluxParams

        if "txt_ids_dims" in FluxParams.__dataclass_fields__:  # newer hosts
            config["txt_ids_dims"] = []
    return cls, config, overrides


def make_model(
    family: str, full_depth: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> comfy.model_patcher.ModelPatcher:
    """A model of `IN_MEMORY`, on the offload device, that keeps its weights and computes in `dtype`."""
    cls, config, overrides = config_of(family, full_depth)
    offload = comfy.model_management.unet_offload_device()
    model = _base_model(cls, config, overrides, offload, dtype)
    fill_module_(model.diffusion_model, seed)
    model.eval()
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), offload)


# --- text encoders ---

_VOCABULARY = 1024


def _fold(token: int) -> int:
    """Id of the real tokenizer -> id in the small table; CLIP's start and end stay the last two."""
    if token in (49406, 49407):
        return token - 49408 + _VOCABULARY
    return token if token < 8 else 8 + token % (_VOCABULARY - 16)


def _folding_tokenizer(tokenizer: type) -> type:
    class Folding(tokenizer):
        def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
            def fold(token):
                return _fold(token) if isinstance(token, int) else token

            encoded = super().tokenize_with_weights(text, return_word_ids, **kwargs)
            return {
                name: [[(fold(t[0]), *t[1:]) for t in chunk] for chunk in chunks]
                for name, chunks in encoded.items()
            }

    return Folding


_ENCODERS = {
    "sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "sd2": (comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.text_encoders.sd2_clip.SD2ClipModel),
    "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    "sd3": (comfy.text_encoders.sd3_clip.SD3Tokenizer, comfy.text_encoders.sd3_clip.sd3_clip()),
    "flux": (comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.flux_clip()),
}


def make_clip(family: str, layers: int = 3, seed: int = 0) -> comfy.sd.CLIP:
    """Text encoders of a family at their real width, with few layers, small MLPs and a 1024-entry vocabulary.

    `layers` must be at least 3, because most families read the last but one hidden state.
    """
    tokenizer, model = _ENCODERS["sd3" if family == "sd35" else family]
    clip_config = {"num_hidden_layers": layers, "intermediate_size": 256, "vocab_size": _VOCABULARY}
    t5_config = {"num_layers": layers, "d_ff": 128, "num_heads": 2, "vocab_size": _VOCABULARY}
    options = {f"clip_{which}_model_config": clip_config for which in "lgh"} | {
        "t5xxl_model_config": t5_config
    }
    target = comfy.supported_models_base.ClipTarget(_folding_tokenizer(tokenizer), model)
    clip = comfy.sd.CLIP(target, parameters=1, model_options=options)
    for module in clip.cond_stage_model.modules():
        if isinstance(getattr(module, "special_tokens", None), dict):
            module.special_tokens = {k: _fold(v) for k, v in module.special_tokens.items()}
        table = getattr(module, "token_embedding", None)
        if table is not None and table.weight.shape[0] != _VOCABULARY:
            # CLIP's size is fixed in code in some versions: shrink the table that was made.
            table.weight = torch.nn.Parameter(table.weight[:_VOCABULARY].clone(), requires_grad=False)
            table.num_embeddings = _VOCABULARY
    fill_module_(clip.cond_stage_model, seed)
    return clip


def make_vae(family: str, seed: int = 0) -> comfy.sd.VAE:
    """A random tiny autoencoder for the family's latents."""
    return comfy.sd.VAE(sd=taesd_state(family, seed))
