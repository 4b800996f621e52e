"""A tiny random model of every family that ComfyUI lists, made from its own classes, with what it is fed.

`FAMILIES` holds one entry a line of ``comfy.supported_models.models``, several where its variants have other layers
or other inputs. An entry builds its model and gives stand-ins for a text encoder and a VAE whose outputs have the
family's own form: conditioning from the text's hash, latents from the colours of a picture. Nothing is loaded from
disk. Weights depend on their names and the seed alone.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import torch
from families import _SD35, _SDXL, _TWO_LEVELS, _UNET, _mmdit, fill_


@dataclass(frozen=True)
class Family:
    """One entry.

    host: class in ``comfy.supported_models``.   config: its diffusion model's options.   cross: (tokens, width) of
    the text.   pooled: width of the pooled text, 0 for none.   more: further entries of the conditioning: a shape
    (random numbers; ones if the name holds "mask"), a number (itself) or "tokens" (twelve small integers).
    ratio: pixels a latent cell, in each direction.   overrides: options set after construction, because the class
    forces them.   beside: the weights beside the diffusion model that the class asks its file for.
    kind: "picture", "video", "audio" or "shape" (3-D objects).   inpaint: prepared as ComfyUI does for such files.
    size: width and height, in pixels, of pictures that are large enough for this family.
    """

    name: str
    host: str
    config: Mapping[str, Any]
    cross: tuple[int, int]
    pooled: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    ratio: int = 8
    overrides: Mapping[str, Any] = field(default_factory=dict)
    beside: Callable[[], dict[str, torch.Tensor]] = dict
    kind: str = "picture"
    inpaint: bool = False
    size: int = 128

    @property
    def missing(self) -> str:
        """Why this ComfyUI cannot make it; "" if it can."""
        return "" if hasattr(supported, self.host) else f"this ComfyUI has no {self.host}"

    @property
    def latent_format(self) -> type:
        return getattr(supported, self.host).latent_format

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
        """The model, on the offload device; it keeps its weights and computes in `dtype`."""
        config = getattr(supported, self.host)(_known(dict(self.config)))
        config.set_inference_dtype(dtype, None)
        config.unet_config.update(self.overrides)
        offload = comfy.model_management.unet_offload_device()
        with torch.no_grad():
            model = config.get_model(self.beside(), "", device=offload)
            if self.inpaint:
                model.set_inpaint()
            for name, weight in model.diffusion_model.named_parameters():
                # Single vectors that are no scale of a norm (pad tokens and the like) are filled like matrices.
                flat = weight.ndim > 1 or not name.endswith(("_token", "modulation", "scale_shift_table"))
                fill_(name, weight if flat else weight[None], seed)
            for name, buffer in model.diffusion_model.named_buffers():
                if name.endswith(("pos_embed", "y_embedding")):  # the others are computed
                    fill_(name, buffer, seed)
        model.eval()
        return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), offload)

    def conditioning(self, text: str = "a cat", seed: int = 0) -> list:
        """ComfyUI's CONDITIONING for a text: [[(1, tokens, width), {"pooled_output": (1, width) or None, ...}]]."""
        generator = torch.Generator().manual_seed((zlib.crc32(text.encode()) + seed) & 0x7FFFFFFF)
        cross = torch.randn(1, *self.cross, generator=generator)
        out: dict[str, Any] = {"pooled_output": None}
        if self.pooled:
            out["pooled_output"] = torch.randn(1, self.pooled, generator=generator)
        for name, what in self.more.items():
            if what == "tokens":
                out[name] = torch.randint(0, 90, (1, 12), generator=generator)
            elif not isinstance(what, tuple):
                out[name] = what
            elif "mask" in name:
                out[name] = torch.ones(1, *what, dtype=torch.long)
            else:
                out[name] = torch.randn(1, *what, generator=generator)
        return [[cross, out]]

    def latents(self, count: int = 1, seed: int = 0, frames: int = 0) -> torch.Tensor:
        """Random latents of the family's form: (count, channels, [frames,] height, width) or (count, channels, length).

        frames: 0 for two, or one where the family draws single pictures.
        """
        generator = torch.Generator().manual_seed(seed)
        channels, dimensions = self.latent_format.latent_channels, self.latent_format.latent_dimensions
        side, frames = self.size // self.ratio, frames or (1 if self.kind == "picture" else 2)
        shape = {1: (64,), 2: (side, side), 3: (frames, side, side)}[dimensions]
        return torch.randn(count, channels, *shape, generator=generator)

    def clip(self) -> TextStandIn:
        """What a text encoder of this family gives, without one."""
        return TextStandIn(self)

    def vae(self) -> PictureStandIn:
        """What a VAE of this family gives, without one; for all families whose latents are pictures."""
        if self.latent_format.latent_dimensions == 1:
            raise ValueError(f"{self.name}: its latents are no pictures")
        return PictureStandIn(self)


def _known(config: dict) -> dict:
    """The options that this version's class of the model has a field for; newer hosts have more."""
    where = {
        "flux": ("flux.model", "FluxParams"),
        "flux2": ("flux.model", "FluxParams"),
        "chroma": ("chroma.model", "ChromaParams"),
        "chroma_radiance": ("chroma_radiance.model", "ChromaRadianceParams"),
        "hunyuan_video": ("hunyuan_video.model", "HunyuanVideoParams"),
    }.get(config.get("image_model", ""))
    if where is None:
        return config
    fields = getattr(importlib.import_module(f"comfy.ldm.{where[0]}"), where[1]).__dataclass_fields__
    return {name: value for name, value in config.items() if name == "image_model" or name in fields}


class _Empty(torch.nn.Module):
    """A module with one weight, for patchers that hold nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 0.1), requires_grad=False)

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict) -> None:
        pass


def _empty_patcher() -> comfy.model_patcher.ModelPatcher:
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(_Empty(), cpu, cpu)


class TextStandIn:
    """A CLIP that gives the family's conditioning, a function of the text alone."""

    layer_idx = None
    apply_hooks_to_conds = None
    use_clip_schedule = False

    def __init__(self, family: Family) -> None:
        self.family, self.patcher = family, _empty_patcher()

    @property
    def cond_stage_model(self) -> torch.nn.Module:
        return self.patcher.model

    def clone(self, **options: Any) -> TextStandIn:
        other = TextStandIn(self.family)
        other.patcher = self.patcher.clone()
        return other

    def tokenize(self, text: str, **options: Any) -> dict:
        return {"letters": [[(ord(letter), 1.0) for letter in text]]}

    def encode_from_tokens_scheduled(self, tokens: dict, show_pbar: bool = False, **options: Any) -> list:
        return self.family.conditioning("".join(chr(token) for token, *_ in tokens["letters"][0]))


class PictureStandIn:
    """A VAE without weights: a latent cell is the mean colour of its pixels, spread over the channels and back."""

    vae_dtype = torch.float32

    def __init__(self, family: Family) -> None:
        self.family, self.patcher = family, _empty_patcher()
        channels = family.latent_format.latent_channels
        generator = torch.Generator().manual_seed(5)
        self._mix = torch.eye(3) if channels == 3 else torch.randn(channels, 3, generator=generator)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """(n, height, width, 3 or more) in 0..1 → (n, channels, [1,] height / ratio, width / ratio)."""
        cells = torch.nn.functional.avg_pool2d(image[..., :3].movedim(-1, 1) * 2 - 1, self.family.ratio)
        latent = torch.einsum("ck,bkhw->bchw", self._mix, cells)
        return latent.unsqueeze(2) if self.family.latent_format.latent_dimensions == 3 else latent

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """(n, channels, [frames,] h, w) → (n · frames, h · ratio, w · ratio, 3) in 0..1."""
        if latent.ndim == 5:
            latent = latent.movedim(2, 1).flatten(0, 1)
        cells = torch.einsum("kc,bchw->bkhw", torch.linalg.pinv(self._mix), latent.float())
        image = torch.nn.functional.interpolate(cells, scale_factor=float(self.family.ratio))
        return (image.movedim(1, -1) / 2 + 0.5).clamp(0, 1)


# --- configurations, as small as the classes allow ----------------------------------------------------------

def _unet(**options: Any) -> dict:
    return {**_UNET, **_TWO_LEVELS, "model_channels": 32, "adm_in_channels": None, **options}


_HEADS = {"num_head_channels": 32}
_SD15_UNET = _unet(use_linear_in_transformer=False, context_dim=768)
_SD2_UNET = _unet(use_linear_in_transformer=True, context_dim=1024)
_SDXL_UNET = {**_unet(**_SDXL), "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]}
_NO_MIDDLE = {**_SDXL_UNET, "transformer_depth_middle": -2}
_VIDEO_UNET = _unet(
    in_channels=8,
    adm_in_channels=768,
    num_classes="sequential",
    use_linear_in_transformer=True,
    context_dim=1024,
    use_temporal_attention=True,
    use_temporal_resblock=True,
    video_kernel_size=[3, 1, 1],
    extra_ff_mix_layer=True,
    use_spatial_context=True,
    merge_strategy="learned_with_images",
    merge_factor=0.0,
)
_TEXT = 64  # width of the text that the transformers read
_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 768,
    "context_in_dim": _TEXT,
    "hidden_size": 64,
    "num_heads": 2,
    "axes_dim": [8, 12, 12],
    "mlp_ratio": 4.0,
    "depth": 2,
    "depth_single_blocks": 2,
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
_FLUX2 = {
    **_FLUX,
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}
_CHROMA = {
    **_FLUX,
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 32,
    "n_layers": 2,
    "vec_in_dim": None,
}
_RADIANCE = {
    **_CHROMA,
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 4,
    "nerf_depth": 2,
    "nerf_max_freqs": 8,
    "nerf_tile_size": 512,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
_LONGCAT = {**_FLUX, "vec_in_dim": None, "guidance_embed": False, "txt_ids_dims": [1, 2]}
_AURAFLOW = {
    "max_seq": 1024,
    "cond_seq_dim": _TEXT,
    "n_double_layers": 2,
    "n_layers": 4,
    "dim": 64,
    "n_heads": 2,
    "global_conddim": 64,
}
_PIXART = {
    "image_model": "pixart_sigma",
    "num_heads": 4,
    "patch_size": 2,
    "hidden_size": 96,
    "in_channels": 4,
    "depth": 2,
    "input_size": 64,
    "pe_interpolation": 1,
    "micro_condition": False,
    "caption_channels": _TEXT,
    "model_max_length": 20,
}
_HYDIT = {
    "image_model": "hydit",
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "text_states_dim": _TEXT,
    "text_states_dim_t5": _TEXT,
}
_HYDIT_TEXT = {
    "attention_mask": (77,),
    "conditioning_mt5xl": (256, _TEXT),
    "attention_mask_mt5xl": (256,),
}
_LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": _TEXT,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 3,
    "n_kv_heads": 1,
    "axes_dims": [8, 12, 12],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
_Z_IMAGE = {  # as wide as the embedding of the time step, which has a fixed width
    **_LUMINA,
    "dim": 256,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": _TEXT,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
_HIDREAM = {
    "image_model": "hidream",
    "attention_head_dim": 32,
    "axes_dims_rope": [16, 8, 8],
    "caption_channels": [_TEXT, _TEXT],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "llama_layers": [0, 1, 1],
    "num_attention_heads": 2,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "num_layers": 2,
    "num_single_layers": 1,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 96,
}
_HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "axes_dim": [8, 12, 12],
    "context_in_dim": _TEXT,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_HUNYUAN15 = {
    **_HUNYUAN,
    "in_channels": 65,
    "out_channels": 32,
    "vec_in_dim": None,
    "guidance_embed": False,
    "use_cond_type_embedding": True,
    "vision_in_dim": 64,
    "meanflow_sum": True,
    "patch_size": [1, 1, 1],
}
_HUNYUAN_IMAGE = {
    **_HUNYUAN,
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "patch_size": [1, 1],
    "axes_dim": [16, 16],
}
_HUNYUAN_REFINER = {**_HUNYUAN, "in_channels": 128, "out_channels": 64, "vec_in_dim": None, "patch_size": [1, 1, 1]}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "out_dim": 16,
    "num_heads": 2,
    "ffn_dim": 128,
    "num_layers": 2,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
    "text_dim": _TEXT,
}
_LTX = {
    "image_model": "ltxv",
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "cross_attention_dim": 64,
    "caption_channels": _TEXT,
}
_MOCHI = {  # the class insists on 12288 hidden channels
    "image_model": "mochi_preview",
    "depth": 2,
    "patch_size": 2,
    "num_heads": 2,
    "hidden_size_x": 64,
    "hidden_size_y": 32,
    "mlp_ratio_x": 192.0,
    "mlp_ratio_y": 4.0,
    "learn_sigma": False,
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "attn_drop": 0.0,
    "patch_embed_bias": True,
    "posenc_preserve_area": True,
    "timestep_mlp_bias": True,
    "attend_to_padding": False,
    "timestep_scale": 1000.0,
    "use_t5": True,
    "t5_feat_dim": _TEXT,
    "t5_token_length": 20,
    "rope_theta": 10000.0,
}
_COSMOS = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "concat_padding_mask": True,
    "crossattn_emb_channels": _TEXT,
    "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 32,
    "num_blocks": 2,
    "num_heads": 2,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
}
_COSMOS1 = {
    **_COSMOS,
    "image_model": "cosmos",
    "model_channels": 64,
    "pos_emb_learnable": False,
    "block_config": "FA-CA-MLP",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
    "rope_h_extrapolation_ratio": 1.0,
    "rope_w_extrapolation_ratio": 1.0,
    "rope_t_extrapolation_ratio": 2.0,
}
_COSMOS2 = {
    **_COSMOS,
    "image_model": "cosmos_predict2",
    "model_channels": 128,
    "pos_emb_learnable": True,
    "min_fps": 1,
    "max_fps": 30,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
_OMNIGEN = {
    "image_model": "omnigen2",
    "axes_dim_rope": [8, 12, 12],
    "axes_lens": [1024, 1664, 1664],
    "ffn_dim_multiplier": None,
    "hidden_size": 96,
    "in_channels": 16,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "out_channels": None,
    "patch_size": 2,
    "text_feat_dim": _TEXT,
    "timestep_scale": 1000.0,
}
_KANDINSKY = {
    "image_model": "kandinsky5",
    "model_dim": 64,
    "time_dim": 32,
    "ff_dim": 128,
    "visual_embed_dim": 132,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (16, 24, 24),
    "in_text_dim": _TEXT,
    "in_text_dim2": 768,
}
_CASCADE_C = {
    "stable_cascade_stage": "c",
    "c_cond": 64,
    "c_hidden": [64, 64],
    "nhead": [2, 2],
    "blocks": [[1, 1], [1, 1]],
    "c_clip_text": _TEXT,
    "c_clip_text_pooled": 64,
    "c_clip_img": 768,
}
_CASCADE_B = {
    "stable_cascade_stage": "b",
    "c_cond": 64,
    "c_hidden": [32, 64],
    "nhead": [-1, 2],
    "blocks": [[1, 1], [1, 1]],
    "block_repeat": [[1, 1], [1, 1]],
    "level_config": ["CT", "CTA"],
    "dropout": [0, 0],
    "c_clip": 64,
}
_ACE = {
    "audio_model": "ace",
    "attention_head_dim": 32,
    "in_channels": 8,
    "inner_dim": 64,
    "max_height": 16,
    "max_position": 32768,
    "max_width": 32768,
    "mlp_ratio": 2.5,
    "num_attention_heads": 2,
    "num_layers": 2,
    "out_channels": 8,
    "patch_size": [16, 1],
    "rope_theta": 1e6,
    "speaker_embedding_dim": 512,
    "text_embedding_dim": _TEXT,
    "ssl_encoder_depths": [8, 8],
    "ssl_latent_dims": [64, 64],
    "ssl_names": ["mert", "m-hubert"],
    "lyric_encoder_vocab_size": 100,
    "lyric_hidden_size": 1024,
}
_STABLE_AUDIO = {"audio_model": "dit1.0", "embed_dim": 128, "cond_token_dim": 768, "depth": 2, "num_heads": 2}
_HUNYUAN3D = {
    "image_model": "hunyuan3d2",
    "in_channels": 64,
    "context_in_dim": _TEXT,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}
_HUNYUAN3D_21 = {
    "image_model": "hunyuan3d2_1",
    "in_channels": 64,
    "context_dim": _TEXT,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 4,
    "qkv_bias": False,
    "guidance_cond_proj_dim": None,
    "num_moe_layers": 1,
    "num_experts": 2,
}
_KREA = {
    "image_model": "krea2",
    "features": 256,
    "channels": 16,
    "patch": 2,
    "layers": 2,
    "heads": 2,
    "kvheads": 1,
    "txtlayers": 3,
    "txtdim": _TEXT,
    "txtheads": 2,
    "txtkvheads": 2,
}


def _seconds() -> dict[str, torch.Tensor]:
    from comfy.ldm.audio.embedders import NumberConditioner

    state = NumberConditioner(768, min_val=0, max_val=512).state_dict()
    filled = {name: fill_(name, torch.empty(value.shape)) for name, value in state.items()}
    return {f"conditioner.conditioners.seconds_{end}.{name}": v for end in ("start", "total") for name, v in filled.items()}


def _views() -> dict[str, torch.Tensor]:
    shapes = {"cc_projection.weight": (768, 772), "cc_projection.bias": (768,)}
    return {name: fill_(name, torch.empty(shape)) for name, shape in shapes.items()}


_C = (20, _TEXT)
_MASK = {"attention_mask": (20,)}


def _video(name: str, host: str, config: Mapping[str, Any], **options: Any) -> Family:
    return Family(name, host, config, **{"cross": _C, "kind": "video", **options})


_ENTRIES = (
    Family("sd15", "SD15", _SD15_UNET, (77, 768), overrides={"num_heads": 4}),
    Family("sd15_inpaint", "SD15", {**_SD15_UNET, "in_channels": 9}, (77, 768), overrides={"num_heads": 4}, inpaint=True),
    Family("sd15_ip2p", "SD15_instructpix2pix", {**_SD15_UNET, "in_channels": 8}, (77, 768), overrides={"num_heads": 4}),
    Family("zero123", "Stable_Zero123", {**_SD15_UNET, "in_channels": 8}, (1, 768), overrides={"num_heads": 4}, beside=_views),
    Family("sd2", "SD20", _SD2_UNET, (77, 1024), overrides=_HEADS),
    Family("sd21_unclip_l", "SD21UnclipL", {**_SD2_UNET, "num_classes": "sequential", "adm_in_channels": 1536}, (77, 1024), overrides=_HEADS),
    Family("sd21_unclip_h", "SD21UnclipH", {**_SD2_UNET, "num_classes": "sequential", "adm_in_channels": 2048}, (77, 1024), overrides=_HEADS),
    Family("sd_x4_upscaler", "SD_X4Upscaler", {**_SD2_UNET, "in_channels": 7}, (77, 1024), ratio=4,
           overrides={"num_heads": 4, "disable_self_attentions": [True, False], "num_classes": 1000}),
    Family("lotus", "LotusD", {**_SD2_UNET, "adm_in_channels": 4}, (77, 1024), overrides=_HEADS),
    Family("sdxl", "SDXL", _SDXL_UNET, (77, 2048), 1280, overrides=_HEADS),
    Family("sdxl_inpaint", "SDXL", {**_SDXL_UNET, "in_channels": 9}, (77, 2048), 1280, overrides=_HEADS, inpaint=True),
    Family("sdxl_ip2p", "SDXL_instructpix2pix", {**_SDXL_UNET, "in_channels": 8}, (77, 2048), 1280, overrides=_HEADS),
    Family("sdxl_refiner", "SDXLRefiner", {**_unet(**_SDXL), "adm_in_channels": 2560, "context_dim": 1280}, (77, 1280), 1280, overrides=_HEADS),
    Family("ssd1b", "SSD1B", {**_SDXL_UNET, "transformer_depth_middle": -1}, (77, 2048), 1280, overrides=_HEADS),
    Family("vega", "Segmind_Vega", {**_SDXL_UNET, "transformer_depth_middle": -1}, (77, 2048), 1280, overrides=_HEADS),
    Family("koala_700m", "KOALA_700M", _NO_MIDDLE, (77, 2048), 1280, overrides=_HEADS),
    Family("koala_1b", "KOALA_1B", _NO_MIDDLE, (77, 2048), 1280, overrides=_HEADS),
    _video("svd", "SVD_img2vid", _VIDEO_UNET, cross=(1, 1024), overrides=_HEADS),
    _video("sv3d_u", "SV3D_u", {**_VIDEO_UNET, "adm_in_channels": 256}, cross=(1, 1024), overrides=_HEADS),
    _video("sv3d_p", "SV3D_p", {**_VIDEO_UNET, "adm_in_channels": 1280}, cross=(1, 1024), overrides=_HEADS),
    Family("sd3", "SD3", _mmdit(2), (77, 4096), 2048),
    Family("sd35", "SD3", _mmdit(2, **_SD35), (77, 4096), 2048),
    Family("flux", "Flux", _FLUX, _C, 768),
    Family("flux_schnell", "FluxSchnell", {**_FLUX, "guidance_embed": False}, _C, 768),
    Family("flux_fill", "FluxInpaint", {**_FLUX, "in_channels": 96}, _C, 768),
    Family("flux_control", "Flux", {**_FLUX, "in_channels": 32}, _C, 768),
    Family("flux2", "Flux2", _FLUX2, _C, ratio=16),
    Family("longcat", "LongCatImage", _LONGCAT, _C),
    Family("chroma", "Chroma", _CHROMA, _C),
    Family("chroma_radiance", "ChromaRadiance", _RADIANCE, _C, ratio=1),
    Family("auraflow", "AuraFlow", _AURAFLOW, _C),
    Family("pixart_alpha", "PixArtAlpha", {**_PIXART, "image_model": "pixart_alpha", "micro_condition": True}, _C, more={"width": 512, "height": 512}, size=512),
    Family("pixart_sigma", "PixArtSigma", _PIXART, _C, size=512),
    Family("hunyuan_dit", "HunyuanDiT", _HYDIT, (77, _TEXT), more=_HYDIT_TEXT),
    Family("hunyuan_dit1", "HunyuanDiT1", {**_HYDIT, "image_model": "hydit1", "size_cond": True, "use_style_cond": True}, (77, _TEXT), more=_HYDIT_TEXT),
    Family("lumina2", "Lumina2", _LUMINA, _C, more={"num_tokens": 20, **_MASK}),
    Family("z_image", "ZImage", _Z_IMAGE, _C, more={"num_tokens": 20}),
    Family("qwen_image", "QwenImage", _QWEN, _C),
    Family("hidream", "HiDream", _HIDREAM, _C, 96, more={"conditioning_llama3": (2, 20, _TEXT)}),
    Family("omnigen2", "Omnigen2", _OMNIGEN, _C, more=_MASK),
    Family("hunyuan_image21", "HunyuanImage21", _HUNYUAN_IMAGE, _C, ratio=32, size=256),
    Family("hunyuan_image21_refiner", "HunyuanImage21Refiner", _HUNYUAN_REFINER, _C, ratio=16),
    Family("cosmos_predict2", "CosmosT2IPredict2", _COSMOS2, _C),
    Family("anima", "Anima", {**_COSMOS2, "image_model": "anima"}, _C),
    Family("kandinsky5_image", "Kandinsky5Image", {**_KANDINSKY, "visual_embed_dim": 64, "rope_scale_factor": (1.0, 1.0, 1.0)}, _C, 768),
    Family("krea2", "Krea2", _KREA, (20, 3 * _TEXT)),
    Family("cascade_c", "Stable_Cascade_C", _CASCADE_C, (77, _TEXT), 64, ratio=32, size=256),
    Family("cascade_b", "Stable_Cascade_B", _CASCADE_B, (77, _TEXT), 64, ratio=4),
    _video("hunyuan_video", "HunyuanVideo", _HUNYUAN, pooled=768),
    _video("hunyuan_video_i2v", "HunyuanVideoI2V", {**_HUNYUAN, "in_channels": 33}, pooled=768),
    _video("skyreels_i2v", "HunyuanVideoSkyreelsI2V", {**_HUNYUAN, "in_channels": 32}, pooled=768),
    _video("hunyuan_video15", "HunyuanVideo15", _HUNYUAN15, ratio=16),
    _video("hunyuan_video15_sr", "HunyuanVideo15_SR_Distilled", {**_HUNYUAN15, "in_channels": 98}, ratio=16),
    _video("wan21_t2v", "WAN21_T2V", _WAN),
    _video("wan21_i2v", "WAN21_I2V", {**_WAN, "model_type": "i2v", "in_dim": 36}),
    _video("wan21_fun_control", "WAN21_FunControl2V", {**_WAN, "model_type": "i2v", "in_dim": 48}),
    _video("wan21_vace", "WAN21_Vace", {**_WAN, "model_type": "vace", "vace_in_dim": 96, "vace_layers": 1}),
    _video("wan21_camera", "WAN21_Camera", {**_WAN, "model_type": "camera", "in_dim": 32}),
    _video("wan21_humo", "WAN21_HuMo", {**_WAN, "model_type": "humo"}, more={"audio_embed": (2, 8, 5, 1280)}),
    _video("wan22_5b", "WAN22_T2V", {**_WAN, "in_dim": 48, "out_dim": 48}, ratio=16),
    _video("wan22_camera", "WAN22_Camera", {**_WAN, "model_type": "camera_2.2", "in_dim": 36}),
    _video("wan22_s2v", "WAN22_S2V", {**_WAN, "model_type": "s2v", "audio_inject_layers": [0, 1]}),
    _video("wan22_animate", "WAN22_Animate", {**_WAN, "model_type": "animate", "in_dim": 36, "num_layers": 5}),
    _video("ltxv", "LTXV", _LTX, ratio=32, size=256, more=_MASK),
    _video("ltxav", "LTXAV", {**_LTX, "image_model": "ltxav"}, ratio=32, size=256),
    _video("mochi", "GenmoMochi", _MOCHI, more=_MASK),
    _video("cosmos1_t2v", "CosmosT2V", _COSMOS1, more=_MASK),
    _video("cosmos1_i2v", "CosmosI2V", {**_COSMOS1, "in_channels": 17}, more=_MASK),
    _video("cosmos_predict2_i2v", "CosmosI2VPredict2", {**_COSMOS2, "in_channels": 17}),
    _video("kandinsky5_video", "Kandinsky5", _KANDINSKY, pooled=768),
    Family("ace_step", "ACEStep", _ACE, _C, more={"conditioning_lyrics": "tokens"}, kind="audio"),
    Family("stable_audio", "StableAudio", _STABLE_AUDIO, (20, 768), beside=_seconds, kind="audio"),
    Family("hunyuan3d", "Hunyuan3Dv2", _HUNYUAN3D, _C, kind="shape"),
    Family("hunyuan3d_mini", "Hunyuan3Dv2mini", _HUNYUAN3D, _C, kind="shape"),
    Family("hunyuan3d_21", "Hunyuan3Dv2_1", _HUNYUAN3D_21, _C, kind="shape"),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ENTRIES}


def available() -> dict[str, Family]:
    """Every entry whose class this ComfyUI has."""
    return {name: family for name, family in FAMILIES.items() if not family.missing}


def sampled(family: Family, steps: int = 2, seed: int = 0) -> torch.Tensor:
    """What the family's tiny model makes of noise in some steps, with ComfyUI's own sampler and guidance 2."""
    import comfy.sample

    model, latent = family.build(seed), family.latents(seed=seed)
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, 2.0, "euler", "simple",
            family.conditioning("a cat"), family.conditioning(""), torch.zeros_like(latent),
            disable_pbar=True, seed=seed,
        )  # fmt: skip
