"""Prefixes: which part of a pipeline a name belongs to, and the path that remains without them.

Parts are "unet" (any diffusion model), "te1" (CLIP-L, CLIP-H, or a language model used as encoder), "te2"
(CLIP-G) and "te3" (T5). Trainers number text encoders by their place in a pipeline, so Flux's T5 is also
called `te2`: the path, which is unmistakable for a T5, wins over the number. A CLIP-G is only ever "te2",
also where it is the only encoder (SDXL's refiner): a file for a CLIP-L must not land in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

PARTS = ("unet", "te1", "te2", "te3")

_ENCODER_PARTS = {
    "clip_l": "te1",
    "clip_h": "te1",
    "clip_g": "te2",
    "t5xxl": "te3",
    "umt5xxl": "te3",
    "t5xl": "te3",
    "t5base": "te3",
    "t5": "te3",
    "pile_t5xl": "te3",
    "mt5xl": "te3",
    "byt5_small": "te3",
}
_KNOWN_ENCODER = "|".join(sorted(_ENCODER_PARTS, key=len, reverse=True))

# A CLIP-G has 32 layers, CLIP-L 12, CLIP-H 24: depth tells them apart where no prefix does.
_CLIP_G_LAYER = re.compile(r"(?:^|[._])(?:encoder[._]layers|resblocks)[._]30[._]")

_T5_PATH = re.compile(
    r"(?:shared$|shared[._]weight$|(?:encoder|decoder)[._](?:block[._]|final_layer_norm|embed_tokens))"
)
# transformers 5 leaves out `text_model`, which T5 and the vision models of this form have another word for.
_CLIP_PATH = re.compile(
    r"(?:text_model[._]|transformer[._]resblocks[._]"
    r"|encoder[._]layers[._]\d+[._](?:self_attn|mlp|layer_norm[12])(?:[._]|$)|embeddings[._](?:token|position)_embedding"
    r"|final_layer_norm(?:[._](?:weight|bias))?$)"
)

_NOISE = re.compile(r"\.default(?=\.|$)|[._]processor(?=[._]to_)")
# What torch.compile, DataParallel, FSDP and activation checkpointing put around modules, and DiffSynth's pipeline in front of them.
# A bare `module` is a word of its own only between dots or in front; the others are nobody else's words.
_WRAPPERS = re.compile(
    r"(?:(?<=[._])|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]|(?:(?<=\.)|^)module\."
    r"|^module_(?=(?:lora|oft|lycoris|base_model)_)|(?:(?<=[._])|^)pipe[._]dit[._]|(?:(?<=\.)|^)pipe\.(?=unet\.|transformer\.|text_encoder)"
)

# One step each: what may stand in front of a module path in an adapter file. A group, if any, is the text
# encoder's number or name. Before `blocks`, `transformer` needs its dot, or the bare name
# `transformer_blocks_0` would lose its first word.
_STEPS: tuple[tuple[re.Pattern[str], str | None], ...] = (
    (re.compile(r"(?:lora|oft|oftv2|boft)[._](?:prior[._])?unet[._]"), "unet"),
    (re.compile(r"(?:lora|oft|oftv2|boft)[._]transformer[._]"), "unet"),
    (re.compile(r"(?:lora|oft|oftv2|boft)[._]prior[._]te[._]"), "te2"),
    (re.compile(r"(?:lora|oft|oftv2|boft)[._]te([123]?)[._]"), "te"),
    (re.compile(r"lycoris[._]"), None),
    (re.compile(r"base_model[._]model[._]"), None),
    (re.compile(r"(?:model[._])?diffusion_model[._]"), "unet"),
    (re.compile(r"unet[._]"), "unet"),
    (re.compile(rf"text_encoders[._]({_KNOWN_ENCODER})[._]"), "te"),
    # ComfyUI since 0.28 also leaves out the encoder's name where it is no CLIP
    (re.compile(r"text_encoders[._](?:(\w+?)[._])?(?=transformer[._])"), "te"),
    (re.compile(rf"({_KNOWN_ENCODER})[._](?!y_embedder[._]|yproj$)"), "te"),  # Mochi's model has such names
    (re.compile(r"text_encoder(?:_([123]))?[._]"), "te"),
    (re.compile(r"te([123]?)\."), "te"),
    (re.compile(r"transformer(?:\.(?!resblocks\.)|_(?!blocks[._]|resblocks[._]))"), "transformer"),
    (re.compile(r"model[._]"), None),
    (re.compile(r"module[._]"), None),
)


@dataclass(frozen=True)
class ModuleName:
    """An adapter's module name taken apart.

    part: what its prefix says it is for; "" = the prefix does not say.
    paths: its path, `_` for `.`, in every possible reading, longest first.
    text: the only kind of text encoder with such a path, "clip" or "t5"; "" = the path does not tell.
    """

    part: str
    paths: tuple[str, ...]
    text: str


def underscored(name: str) -> str:
    """The spelling used for matching: every `.` as `_`."""
    return name.replace(".", "_")


def unwrapped(name: str) -> str:
    """The name without what wrappers of models (`_orig_mod.`, `module.`, `pipe.dit.` ...) put into it, dotted or underscored."""
    # Most names have none of these, and there may be very many names.
    if "module" in name or "_orig_mod" in name or "pipe" in name:
        return _WRAPPERS.sub("", name)
    return name


def clean(module: str) -> str:
    """The module name without segments that mean nothing (`.default`, `.processor`, wrappers)."""
    return _NOISE.sub("", unwrapped(module))


def is_t5_path(path: str) -> bool:
    """True for a path inside a T5 encoder, dotted or underscored."""
    return _T5_PATH.match(path) is not None


def is_clip_path(path: str) -> bool:
    """True for a path that can only be inside a CLIP text encoder, dotted or underscored."""
    return _CLIP_PATH.match(path) is not None


def bare_text_path(path: str) -> str:
    """The path without an outer `text_model`, which some spellings leave out."""
    return re.sub(r"^text_model[._]", "", path)


def parse(module: str) -> ModuleName:
    """Take a cleaned adapter module name apart.

    Every reading is kept (with and without `model_`, for example), the longest first, since a prefix may
    also be the first word of a path. The first prefix that names a part decides; a later one that
    contradicts it is read as part of the path.
    """
    rest, part = module, ""
    readings = [rest]
    while True:
        for pattern, says in _STEPS:
            match = pattern.match(rest)
            if match is None or match.end() == len(rest):
                continue
            found = _said(says, match, rest[match.end() :], part)
            if part and found and (found == "unet") != (part == "unet"):
                continue
            part, rest = part or found, rest[match.end() :]
            readings.append(rest)
            break
        else:
            break
    text = "t5" if is_t5_path(rest) else "clip" if is_clip_path(rest) else ""
    if part.startswith("te") and text == "t5":
        part = "te3"
    if part != "unet":
        readings.append(bare_text_path(rest))
    return ModuleName(part, tuple(dict.fromkeys(underscored(r) for r in readings)), text)


def component(module: str, clip: str = "te1") -> str:
    """The part an adapter's module name is for: "unet", "te1", "te2" or "te3".

    Names whose prefix does not say (`lycoris_`, `base_model.model.`, bare) are judged by their path. clip: which CLIP such a
    path is for, see `loose_clip`.
    """
    name = parse(clean(module))
    return name.part or {"t5": "te3", "clip": clip}.get(name.text, "unet")


def loose_clip(modules: Iterable[str]) -> str:
    """Which CLIP the modules of one file are for whose prefix does not say: "te2" if they reach as deep as a CLIP-G, else "te1"."""
    names = ((parse(clean(m)), m) for m in modules)
    return "te2" if any(not n.part and n.text == "clip" and _CLIP_G_LAYER.search(f"{m}.") for n, m in names) else "te1"


def _said(says: str | None, match: re.Match[str], rest: str, part: str) -> str:
    if says is None:
        return ""
    if says == "transformer":  # diffusers' name of the diffusion model, and ComfyUI's of every text model
        if part.startswith("te") or is_clip_path(rest) or is_t5_path(rest):
            return part
        return "unet"
    if says != "te":
        return says
    return encoder_part(match.group(1) or "1")


def encoder_part(name: str) -> str:
    """The part of a text encoder given by number ("1".."3") or ComfyUI's name; "te1" for unknown names."""
    return f"te{name}" if name in ("1", "2", "3") else _ENCODER_PARTS.get(name, "te1")


# Where parts live in models: whole checkpoints, ComfyUI's live models, diffusers-like collections.
_BASE_PREFIX: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"(?:first_stage_model|vae|model_ema|control_model|vision_model|visual_projection|clip_vision)\."
        ),
        "none",
    ),
    (re.compile(r"(?:model\.)?diffusion_model\.|unet\."), "unet"),
    (re.compile(r"cond_stage_model\.(?:model|transformer)\."), "te1"),
    (re.compile(r"conditioner\.embedders\.0\.transformer\."), "te1"),
    (re.compile(r"conditioner\.embedders\.0\.model\."), "by depth"),
    (re.compile(r"conditioner\.embedders\.1\.(?:model|transformer)\."), "te2"),
    (re.compile(r"text_encoders\.(\w+)\."), "te"),
    (re.compile(rf"(?:cond_stage_model\.)?({_KNOWN_ENCODER})\."), "te"),
    # a text encoder of a name we do not know, recognised by what is inside
    (
        re.compile(
            r"(?:cond_stage_model\.)?(\w+)\.transformer\."
            r"(?=text_model\.|shared\.|(?:en|de)coder\.block\.|model\.(?:layers|embed_tokens|norm)\.)"
        ),
        "te",
    ),
    (re.compile(r"text_encoder(?:_([123]))?\."), "te"),
    (re.compile(r"te([123]?)\."), "te"),
)
_OPEN_CLIP_LOOSE = re.compile(
    r"(?:token_embedding\.|positional_embedding$|ln_final\.|text_projection|logit_scale$)"
)
_LANGUAGE_MODEL = re.compile(r"model\.(?:layers|embed_tokens|norm)\.")


class BaseNames:
    """Splits the parameter names of one model into (part, dotted path).

    Looks at all names once, for what a single one cannot tell.
    """

    def __init__(self, keys: Iterable[str]):
        keys = list(keys)
        loose = [
            k
            for k in keys
            if is_clip_path(k.removeprefix("transformer.")) or k.startswith("transformer.resblocks.")
        ]
        self._loose_clip = "te2" if any(_CLIP_G_LAYER.search(k) for k in loose) else "te1"
        self._loose_open_clip = any(k.startswith("transformer.resblocks.") for k in loose)
        self._loose_language_model = "model.embed_tokens.weight" in keys
        first = [k for k in keys if k.startswith("conditioner.embedders.0.model.")]
        self._by_depth = "te2" if any(_CLIP_G_LAYER.search(k) for k in first) else "te1"

    def split(self, key: str) -> tuple[str, str]:
        """(part, path) of one parameter; part is "none" for the VAE and all else that no adapter is for."""
        for pattern, says in _BASE_PREFIX:
            match = pattern.match(key)
            if match is None:
                continue
            part, path = says, key[match.end() :]
            if says in ("unet", "none"):
                return part, path
            if says == "by depth":
                part = self._by_depth
            elif says == "te":
                part = encoder_part(match.group(1) or "1")
            if path.startswith("transformer.") and not path.startswith("transformer.resblocks."):
                path = path[len("transformer.") :]
            return ("te3" if is_t5_path(path) else part), bare_text_path(path)
        return self._split_unprefixed(key)

    def _split_unprefixed(self, key: str) -> tuple[str, str]:
        path = key
        if path.startswith("transformer.") and not path.startswith("transformer.resblocks."):
            path = path[len("transformer.") :]
        if is_t5_path(path):
            return "te3", path
        if is_clip_path(path) or (self._loose_open_clip and _OPEN_CLIP_LOOSE.match(path)):
            return self._loose_clip, bare_text_path(path)
        if _LANGUAGE_MODEL.match(path) and self._loose_language_model:
            return "te1", path
        return "unet", path.removeprefix("model.")
