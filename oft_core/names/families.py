"""What model is this, what model is that file for? Only for messages; nothing is resolved by it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .spelling import clean, parse

# A module path that only this family has. The first hit wins, so variants stand before what they vary.
_MODEL_MARKS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (family, re.compile(pattern))
    for family, pattern in (
        ("chroma", r"distilled_guidance_layer\."),
        ("flux2", r"double_stream_modulation_img\."),
        ("hunyuan3d", r"latent_in$"),
        ("hunyuan_video", r"txt_in\.individual_token_refiner\.|context_embedder\.token_refiner\."),
        (
            "flux",
            r"double_blocks\.\d+\.|single_blocks\.\d+\.linear1|single_transformer_blocks\.\d+\.proj_mlp",
        ),
        ("sd3", r"joint_blocks\.\d+\."),
        ("ltx", r"(?:model\.)?patchify_proj$"),
        ("qwen_image", r"transformer_blocks\.\d+\.img_mod\.1"),
        ("auraflow", r"double_layers\.\d+\.|joint_transformer_blocks\.\d+\."),
        ("omnigen2", r"ref_image_refiner\.\d+\."),
        ("lumina2", r"noise_refiner\.\d+\."),
        ("pixart", r"blocks\.\d+\.cross_attn\.kv_linear"),
        ("wan", r"blocks\.\d+\.cross_attn\.norm_q|condition_embedder\.time_proj$"),
        ("hidream", r"double_stream_blocks\.\d+\."),
        ("hunyuan_dit", r"blocks\.\d+\.attn1\.Wqkv|time_extra_emb\."),
        ("cosmos", r"blocks\.block\d+\.|blocks\.\d+\.mlp\.layer1|time_embed\.t_embedder\."),
        ("mochi", r"blocks\.\d+\.attn\.qkv_x|time_embed\.pooler\."),
        ("cascade", r"down_blocks\.\d+\.\d+\.depthwise"),
        ("ace_step", r"lyric_proj$"),
        ("stable_audio", r"transformer\.layers\.\d+\.self_attn\.to_qkv|cross_attention_proj\."),
    )
)
_UNET = re.compile(r"(?:input|output|middle|down|up|mid)_blocks?\.")
_CROSS_KEY = re.compile(r"attn2\.to_k$")


def family_of_model(parts: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    """The family of a model given, for each part, its module paths and weight shapes.

    "sd1", "sd2", "sdxl" (also its refiner), "svd" (also SV3D), "unet" (a U-Net that could be several), "sd3",
    "flux", "flux2", "chroma", "hunyuan_video" (also HunyuanImage 2.1), "ltx", "qwen_image", "auraflow", "lumina2"
    (also Z-Image), "omnigen2", "pixart", "wan", "hidream", "hunyuan_dit", "cosmos" (also Anima), "mochi", "cascade",
    "ace_step", "stable_audio", "hunyuan3d", "text encoder", or "unknown".

    The U-Nets differ in the width of the text they read (SD1 768, SD2 1024, SDXL 2048, its refiner 1280). For
    other widths: SDXL embeds more than the time step, and attention entered by a convolution means SD1.
    """
    unet = parts.get("unet", {})
    for family, mark in _MODEL_MARKS:
        if any(map(mark.match, unet)):
            return family
    if "pos_embed.proj" in unet and "context_embedder" in unet:
        return "sd3"  # diffusers
    if any(map(_UNET.match, unet)):
        return _unet_family(unet)
    if not unet and any(parts.get(part) for part in ("te1", "te2", "te3")):
        return "text encoder"
    return "unknown"


def _unet_family(unet: Mapping[str, Sequence[int]]) -> str:
    if any(".time_stack." in path or ".temporal_transformer_blocks." in path for path in unet):
        return "svd"
    widths = {shape[1] for path, shape in unet.items() if _CROSS_KEY.search(path) and len(shape) == 2}
    for width, family in ((768, "sd1"), (1024, "sd2"), (1280, "sdxl"), (2048, "sdxl")):
        if widths == {width}:
            return family
    if any(path.startswith(("label_emb.", "add_embedding.")) for path in unet):
        return "sdxl"
    if any(".transformer_blocks.1." in path for path in unet):  # SD1 and SD2 have one block a place
        return "sdxl"
    entries = {len(shape) for path, shape in unet.items() if path.endswith(".proj_in")}
    return "sd1" if 4 in entries else "unet"


#: What trainers call families in ``ss_base_model_version`` and ``modelspec.architecture``.
_SAID = (
    ("sdxl", re.compile(r"sdxl|stable-diffusion-xl")),
    ("sd1", re.compile(r"sd[_-]?v?1|stable-diffusion-v?1")),
    ("sd2", re.compile(r"sd[_-]?v?2|stable-diffusion-v?2")),
    ("sd3", re.compile(r"sd[_-]?v?3|stable-diffusion-v?3")),
    ("flux", re.compile(r"flux[._-]?1")),
)
DECLARED = frozenset(family for family, _ in _SAID)


def declared_family(metadata: Mapping[str, str]) -> str:
    """The family that a file's metadata names: one of `DECLARED`, "" if it names none of them."""
    for key in ("ss_base_model_version", "modelspec.architecture"):
        said = metadata.get(key, "").strip().lower()
        found = next((family for family, pattern in _SAID if pattern.match(said)), "")
        if found:
            return found
    return ""


_LANGUAGE = re.compile(
    r"(?:base_model\.model\.)?(?:model\.(?:language_model\.)?layers\.\d+\.(?:self_attn|mlp|linear_attn)\.|transformer\.h\.\d+\.(?:attn|mlp)\.|"
    r"gpt_neox\.layers\.\d+\.|model\.decoder\.layers\.\d+\.(?:self_attn|fc\d))"
)


def is_language_model(modules: Iterable[str]) -> bool:
    """Whether an adapter file turns a language model (Llama, Qwen, GPT-2, OPT and the like), from its module names alone."""
    return any(_LANGUAGE.match(clean(module)) for module in modules)


# What only this family's files have. The first hit wins.
_FILE_MARKS = tuple(
    (family, re.compile(pattern))
    for family, pattern in (
        ("chroma", r"distilled_guidance_layer_"),
        ("flux2", r"(?:double|single)_stream_modulation_|single_transformer_blocks_\d+_attn_to_(?:qkv_mlp_proj|out)$"),
        ("hunyuan_video", r"txt_in_individual_token_refiner_|context_embedder_token_refiner_"),
        ("qwen_image", r"transformer_blocks_\d+_(?:img|txt)_(?:mod|mlp)_"),
        ("hidream", r"(?:double|single)_stream_blocks_"),
        ("lumina2", r"(?:layers|noise_refiner|context_refiner)_\d+_attention_"),
        ("wan", r"(?:vace_)?blocks_\d+_(?:self|cross)_attn_[qkvo](?:_img)?$|condition_embedder_"),
        ("cosmos", r"blocks_\d+_(?:self|cross)_attn_output_proj|blocks_block\d+_blocks_"),
        ("auraflow", r"(?:double|single)_layers_\d+_|joint_transformer_blocks_"),
        ("hunyuan_dit", r"blocks_\d+_attn[12]_(?:Wqkv|kv_proj)"),
        ("mochi", r"blocks_\d+_attn_(?:qkv|proj)_[xy]$"),
    )
)
_FLUX_FILE = re.compile(
    r"(?:double|single)_blocks_\d+_(?:img_|txt_|linear|modulation)|single_transformer_blocks_\d+_"
)
_JOINT_FILE = re.compile(r"transformer_blocks_\d+_(?:attn_(?:to|add)_|norm1_context_|ff_context_)")
_UNET_FILE = re.compile(r"(?:input|output|middle|down|up|mid)_blocks?_")
_SEVERAL_DEEP = re.compile(r".*_transformer_blocks_[1-9]")
_NOT_SDXL = re.compile(
    r"input_blocks_[12]_1_|output_blocks_(?:[678]_1_t|9_|1\d_)|down_blocks_(?:0_att|3_)|up_blocks_(?:2_att|3_)"
)


def guess_family(modules: Iterable[str]) -> str:
    """What an adapter file is for, from its module names alone.

    A family of `family_of_model` if a name is only its own: "chroma", "flux2", "hunyuan_video", "qwen_image",
    "hidream", "lumina2", "wan", "cosmos", "auraflow", "hunyuan_dit", "mochi". Else "flux": Flux names, original or
    diffusers (HunyuanVideo and Chroma share those of the blocks); "sd3": `joint_blocks`; "flux or sd3": diffusers names
    of joint attention without any single block; "sdxl": several transformer blocks in one place, or CLIP-G beside a
    U-Net; "sd1 or sd2": a U-Net with blocks where SDXL has none; "sd1, sd2 or sdxl": a U-Net of which no more can be
    told; "text encoder": nothing else in the file; otherwise "unknown".
    """
    names = [parse(clean(module)) for module in modules]
    text = {name.part for name in names if name.part.startswith("te")}
    text |= {"clip" for name in names if not name.part and name.text}
    paths = [name.paths[-1] for name in names if name.part == "unet" or not (name.part or name.text)]
    if not paths:
        return "text encoder" if text else "unknown"
    for family, mark in _FILE_MARKS:
        if any(map(mark.match, paths)):
            return family
    if any(map(_FLUX_FILE.match, paths)):
        return "flux"
    if any(path.startswith("joint_blocks_") for path in paths):
        return "sd3"
    if any(map(_JOINT_FILE.match, paths)):
        return "flux or sd3"
    if any(map(_UNET_FILE.match, paths)):
        if "te2" in text or any(map(_SEVERAL_DEEP.match, paths)):
            return "sdxl"
        return "sd1 or sd2" if any(map(_NOT_SDXL.match, paths)) else "sd1, sd2 or sdxl"
    return "unknown"
