"""What trainers call the layers of every family, and the rows that each name means, from sources other than the pack.

The authors' names are those of ComfyUI's modules. Diffusers' names come from ComfyUI's own tables (U-Nets, SD 3,
Flux.1, AuraFlow, PixArt, Z-Image) or from diffusers' own conversions of checkpoints, which are run on numbered rows: where
a number arrives tells which rows of which matrix a name means. Families that neither of them converts (HunyuanDiT,
Cosmos 1, Stable Audio, video U-Nets) are renamed here by the rules of diffusers' conversion scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import comfy.utils
import torch

#: State without prefix, of numbered rows -> the same under diffusers' names.
Convert = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Piece:
    """What a name means: the weight of module `path`, of it the rows (start, length) or all (None).

    swap: the file's two halves of the rows are the model's in the other order.
    """

    path: str
    rows: tuple[int, int] | None = None
    swap: bool = False


def own_names(model: torch.nn.Module) -> dict[str, Piece]:
    """The authors' names of a diffusion model: every layer whose weight is a matrix or a convolution."""
    state = model.state_dict()
    return {k.removesuffix(".weight"): Piece(k.removesuffix(".weight")) for k, v in state.items() if k.endswith(".weight") and v.ndim > 1}


def diffusers_names(name: str, model: torch.nn.Module, config: Mapping) -> dict[str, Piece]:
    """Diffusers' names of an entry's layers; {} for families that diffusers does not have.

    name: the entry's, in `every_family`.   model: its diffusion model.   config: ComfyUI's options of it (``unet_config``).
    """
    own = own_names(model)
    for families, source in _SOURCES:
        if re.fullmatch(families, name):
            if source is None:
                return {}
            found = source(model, config)
            return {n: piece for n, piece in found.items() if piece.path in own and not n.endswith((".gamma", ".scale"))}
    raise KeyError(f"{name} has no source of diffusers' names")


# --- ComfyUI's tables ---------------------------------------------------------------------------------------------


def _table(function: Callable) -> Callable:
    def source(model: torch.nn.Module, config: Mapping) -> dict[str, Piece]:
        out = {}
        for name, to in function(config).items():
            if name.endswith(".weight"):
                key, span, swap = (*to, None, None)[:3] if isinstance(to, tuple) else (to, None, None)
                rows = None if span is None else (span[1], span[2])
                out[name.removesuffix(".weight")] = Piece(key.removesuffix(".weight"), rows, swap is not None)
        return out

    return source


def _same(model: torch.nn.Module, config: Mapping) -> dict[str, Piece]:
    return own_names(model)


# --- conversions of numbered rows ---------------------------------------------------------------------------------


def _numbered(model: torch.nn.Module, scale: int) -> dict[str, torch.Tensor]:
    """Every parameter with `scale` times its rows, all rows of the model numbered through, one number a row."""
    out, first = {}, 0
    for name, value in model.state_dict().items():
        rows = (value.shape[0] if value.ndim else 1) * scale
        out[name] = torch.arange(first, first + rows).reshape(rows, *[1] * (value.ndim - 1))
        first += rows
    return out


def _converted(convert: Convert, scale: int = 1) -> Callable:
    """scale: how much wider the real model is, for conversions that know its width."""

    def source(model: torch.nn.Module, config: Mapping) -> dict[str, Piece]:
        numbered = _numbered(model, scale)
        owner = {int(value.flatten()[0]): name for name, value in numbered.items()}
        starts = torch.tensor(sorted(owner))
        out = {}
        for name, value in convert({k: v.clone() for k, v in numbered.items()}).items():
            if not name.endswith(".weight") or value.ndim < 2:
                continue
            rows = value.flatten()
            half = len(rows) // 2
            swap = bool(rows[0] > rows[-1])
            if swap:
                rows = torch.cat([rows[half:], rows[:half]])
            assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[0]) + len(rows))), name
            begin = int(starts[starts <= rows[0]][-1])
            key = owner[begin]
            whole = len(rows) == numbered[key].shape[0]
            span = ((int(rows[0]) - begin) // scale, len(rows) // scale)
            out[name.removesuffix(".weight")] = Piece(key.removesuffix(".weight"), None if whole else span, swap)
        return out

    return source


def _by(function: str, scale: int = 1) -> Callable:
    def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from diffusers.loaders import single_file_utils

        return getattr(single_file_utils, f"convert_{function}")(state)

    return _converted(convert, scale)


def _renamed(state: dict[str, torch.Tensor], *rules: tuple[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for name, value in state.items():
        for pattern, to in rules:
            name = re.sub(pattern, to, name)
        out[name] = value
    return out


def _hunyuan(time: str) -> Callable:
    def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

        # ComfyUI's names back to the authors'.
        state = {k: v for k, v in state.items() if not k.endswith(".scale")}
        beside = {k: state.pop(k) for k in list(state) if k.startswith(("vision_in.", "cond_type_embedding.", "byt5_in."))}
        state = _renamed(
            state,
            (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
            (r"mlp\.0\.", "mlp.fc1."),
            (r"mlp\.2\.", "mlp.fc2."),
            (r"(_mod|modulation)\.lin\.", r"\1.linear."),
            (r"(time_in|guidance_in|t_embedder)\.in_layer\.", r"\1.mlp.0."),
            (r"(time_in|guidance_in|t_embedder)\.out_layer\.", r"\1.mlp.2."),
            (r"c_embedder\.in_layer\.", "c_embedder.linear_1."),
            (r"c_embedder\.out_layer\.", "c_embedder.linear_2."),
        )
        state = convert_hunyuan_video_transformer_to_diffusers(state)
        beside = _renamed(
            beside,
            (r"vision_in\.proj\.1\.", "image_embedder.linear_1."),
            (r"vision_in\.proj\.3\.", "image_embedder.linear_2."),
            (r"cond_type_embedding\.", "cond_type_embed."),
        )
        return _renamed({**state, **beside}, (r"^time_text_embed\.", time))

    return _converted(convert, 48)


def _cosmos1(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return _renamed(
        {k: v for k, v in state.items() if not k.startswith("pos_embedder.")},
        (r"^t_embedder\.1\.", "time_embed.t_embedder."),
        (r"^x_embedder\.proj\.1\.", "patch_embed.proj."),
        (r"^blocks\.block(\d+)\.", r"transformer_blocks.\1."),
        (r"\.blocks\.0\.block\.attn\.", ".attn1."),
        (r"\.blocks\.1\.block\.attn\.", ".attn2."),
        (r"\.blocks\.2\.block\.layer1\.", ".ff.net.0.proj."),
        (r"\.blocks\.2\.block\.layer2\.", ".ff.net.2."),
        (r"\.blocks\.0\.adaLN_modulation\.", ".norm1.linear_"),
        (r"\.blocks\.1\.adaLN_modulation\.", ".norm2.linear_"),
        (r"\.blocks\.2\.adaLN_modulation\.", ".norm3.linear_"),
        (r"\.to_([qkv])\.0\.", r".to_\1."),
        (r"^final_layer\.adaLN_modulation\.", "norm_out.linear_"),
        (r"^final_layer\.linear\.", "proj_out."),
    )


def _cascade(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers

    for key in [k for k in state if ".attn.to_q." in k]:
        parts = [state.pop(key.replace(".to_q.", f".to_{part}.")) for part in "qkv"]
        state[key.replace(".to_q.", ".in_proj_")] = torch.cat(parts)
    return convert_stable_cascade_unet_single_file_to_diffusers(state)


def _mochi(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers

    # That conversion wants 48 blocks, the last of which is made otherwise: ours are the first and the last.
    blocks = {k: v for k, v in state.items() if k.startswith("blocks.")}
    state = {k: v for k, v in state.items() if k not in blocks}
    for key, value in blocks.items():
        _, number, rest = key.split(".", 2)
        state |= {f"blocks.{n}.{rest}": value for n in (range(47) if number == "0" else (47,))}
    done = convert_mochi_transformer_checkpoint_to_diffusers(state)
    done = {k: v for k, v in done.items() if not re.match(r"transformer_blocks\.(?!0\.|47\.)", k)}
    return _renamed(done, (r"^transformer_blocks\.47\.", "transformer_blocks.1."))


def _split(state: dict[str, torch.Tensor], word: str, parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    out = {}
    for name, value in state.items():
        if f".{word}." in name:
            out |= {name.replace(f".{word}.", f".{p}."): v for p, v in zip(parts, value.chunk(len(parts)), strict=True)}
        else:
            out[name] = value
    return out


def _swapped(state: dict[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
    return {k: torch.cat(v.chunk(2)[::-1]) if k.startswith(start) else v for k, v in state.items()}


def _hunyuan_dit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = _split(_split(state, "Wqkv", ("to_q", "to_k", "to_v")), "kv_proj", ("to_k", "to_v"))
    return _renamed(
        _swapped(state, "final_layer.adaLN_modulation.1."),
        (r"attn2\.q_proj\.", "attn2.to_q."),
        (r"(attn\d)\.out_proj\.", r"\1.to_out.0."),
        (r"default_modulation\.1\.", "norm1.linear."),
        (r"mlp\.fc1\.", "ff.net.0.proj."),
        (r"mlp\.fc2\.", "ff.net.2."),
        (r"^(pooler|style_embedder)\.", r"time_extra_emb.\1."),
        (r"^t_embedder\.mlp\.0\.", "time_extra_emb.timestep_embedder.linear_1."),
        (r"^t_embedder\.mlp\.2\.", "time_extra_emb.timestep_embedder.linear_2."),
        (r"^extra_embedder\.0\.", "time_extra_emb.extra_embedder.linear_1."),
        (r"^extra_embedder\.2\.", "time_extra_emb.extra_embedder.linear_2."),
        (r"^x_embedder\.", "pos_embed."),
        (r"^mlp_t5\.0\.", "text_embedder.linear_1."),
        (r"^mlp_t5\.2\.", "text_embedder.linear_2."),
        (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear."),
        (r"^final_layer\.linear\.", "proj_out."),
    )


def _stable_audio(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {k: v for k, v in state.items() if not k.startswith("timestep_features.")}  # diffusers makes it one row
    state = _split(_split(state, "to_qkv", ("to_q", "to_k", "to_v")), "to_kv", ("to_k", "to_v"))
    return _renamed(
        state,
        (r"^transformer\.", ""),
        (r"^layers\.", "transformer_blocks."),
        (r"self_attn\.", "attn1."),
        (r"cross_attn\.", "attn2."),
        (r"ff\.ff\.", "ff.net."),
        (r"to_out\.", "to_out.0."),
        (r"^project_", "proj_"),
        (r"^to_timestep_embed\.", "timestep_proj."),
        (r"^to_global_embed\.", "global_proj."),
        (r"^to_cond_embed\.", "cross_attention_proj."),
    )


def _video_unet(model: torch.nn.Module, config: Mapping) -> dict[str, Piece]:
    """ComfyUI's table of U-Nets knows the layers for single pictures; those along time stand beside them."""
    own, out = own_names(model), {}
    for name, piece in _table(comfy.utils.unet_to_diffusers)(model, config).items():
        if ".resnets." in name:
            place, inner = re.fullmatch(r"(.+\.resnets\.\d+)\.(\w+)", name).groups()
            out[f"{place}.spatial_res_block.{inner}"] = piece
            block, inner_own = re.fullmatch(r"((?:in|out)put_blocks\.\d+\.\d+|middle_block\.\d+)\.(.+)", piece.path).groups()
            if f"{block}.time_stack.{inner_own}" in own:
                out[f"{place}.temporal_res_block.{inner}"] = Piece(f"{block}.time_stack.{inner_own}")
            continue
        out[name] = piece
        place, block = (re.match(r"(.+\.\d+)\.proj_in$", text) for text in (name, piece.path))
        for path in own if place and block else ():
            if path.startswith(f"{block[1]}.time_stack."):
                out[f"{place[1]}.temporal_transformer_blocks." + path.removeprefix(f"{block[1]}.time_stack.")] = Piece(path)
            elif path.startswith(f"{block[1]}.time_pos_embed."):
                linear = {"0": "linear_1", "2": "linear_2"}[path[-1]]
                out[f"{place[1]}.time_pos_embed.{linear}"] = Piece(path)
    return out


_UNETS = r"sd15.*|sd2.*|sdxl.*|sd_x4_upscaler|lotus|zero123|ssd1b|vega|koala_.*"
_SOURCES: tuple[tuple[str, Callable | None], ...] = (
    (_UNETS, _table(comfy.utils.unet_to_diffusers)),
    (r"svd|sv3d_.", _video_unet),
    (r"sd3|sd35", _table(comfy.utils.mmdit_to_diffusers)),
    (r"flux|flux_.*|longcat|chroma_radiance", _table(comfy.utils.flux_to_diffusers)),
    (r"auraflow", _table(comfy.utils.auraflow_to_diffusers)),
    (r"pixart_.*", _table(comfy.utils.pixart_to_diffusers)),
    (r"z_image", _table(comfy.utils.z_image_to_diffusers)),
    (r"flux2", _by("flux2_transformer_checkpoint_to_diffusers")),
    (r"chroma", _by("chroma_transformer_checkpoint_to_diffusers", 48)),
    (r"lumina2", _by("lumina2_to_diffusers", 24)),
    (r"hunyuan_dit.*", _converted(_hunyuan_dit)),
    (r"hunyuan_video|hunyuan_video_i2v|skyreels_i2v", _hunyuan("time_text_embed.")),
    (r"hunyuan_image21.*", _hunyuan("time_guidance_embed.")),
    (r"hunyuan_video15.*", _hunyuan("time_embed.")),
    (r"wan2\d_(?:t2v|i2v|vace|fun_control|5b|animate)", _by("wan_transformer_to_diffusers")),
    (r"ltxv|ltxav", _by("ltx_transformer_checkpoint_to_diffusers")),
    (r"cosmos1_.*", _converted(_cosmos1)),
    (r"cosmos_predict2.*|anima", _by("cosmos_transformer_checkpoint_to_diffusers")),
    (r"mochi", _converted(_mochi)),
    (r"cascade_.", _converted(_cascade)),
    (r"stable_audio", _converted(_stable_audio)),
    (r"qwen_image|hidream|omnigen2|ace_step", _same),  # ComfyUI's names are diffusers' or the trainer's
    (r"wan2\d_(?:camera|humo|s2v)|hunyuan3d.*|kandinsky5_.*|krea2", None),
)
