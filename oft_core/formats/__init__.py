"""The table of dialects: which suffixes a layer has decides which reader it gets (first hit wins)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from . import comfy, kohya, lycoris, onetrainer, paper, peft, relatives
from .common import Context, Maker, Module, Piece, ReadOptions
from .keys import group, peft_reason, speaks_of_oft

__all__ = [
    "DIALECTS", "Context", "Dialect", "Maker", "Module", "Piece", "ReadOptions", "detect", "group", "peft_reason",
    "reader", "what_is_it",
]


@dataclass(frozen=True)
class Dialect:
    """One dialect: its id in the documentation, its name for people, and the reader of one module."""

    id: str
    title: str
    read: Callable[[Module], Maker]
    #: rotates the input side, so that neuron norms and hyperspherical energy are kept
    input_side: bool


DIALECTS: dict[str, Dialect] = {
    d.id: d
    for d in (
        Dialect("F1", "kohya OFT", kohya.read_f1, False),
        Dialect("F2", "kohya OFT for Flux (split layers)", kohya.read_f2, False),
        Dialect("F3", "LyCORIS Diag-OFT", lycoris.read_f3, False),
        Dialect("F3a", "LyCORIS Diag-OFT of 2023 (finished matrices)", lycoris.read_f3_diag, False),
        Dialect("F3b", "LyCORIS Diag-OFT 2.0 preview (additive)", lycoris.read_f3_diag, False),
        Dialect("F4", "LyCORIS BOFT", lycoris.read_f4, False),
        Dialect("F4a", "LyCORIS BOFT preview (finished factors)", lycoris.read_f4_diag, False),
        Dialect("F5", "ComfyUI Train LoRA node, OFT", comfy.read_f5, False),
        Dialect("F5d", "additive differences", comfy.read_differences, False),
        Dialect("F6", "PEFT OFT 0.7-0.13", peft.read_f6, False),
        Dialect("F7", "PEFT OFT 0.14-0.15", peft.read_f7, True),
        Dialect("F8", "PEFT OFT 0.16-0.17", peft.read_f9, True),
        Dialect("F9", "PEFT OFT 0.18 and later", peft.read_f9, True),
        Dialect("F10", "PEFT BOFT", peft.read_f10, True),
        Dialect("F11", "OneTrainer OFT v2", onetrainer.read_oft_v2, True),
        Dialect("F12", "OneTrainer OFT v2 with extras", onetrainer.read_oft_v2, True),
        Dialect("F13", "musubi-tuner (LTX-2) OFT", onetrainer.read_oft_v2, True),
        Dialect("F14", "OFT v2 of sd-scripts or Takenoko", onetrainer.read_oft_v2, True),
        Dialect("F15", "OFT paper repository", paper.read_f15, True),
        Dialect("F16", "PEFT RoAd", relatives.read_f16, False),
        Dialect("F17", "PEFT HRA", relatives.read_f17, True),
        Dialect("F18", "PEFT PSOFT", relatives.read_f18, True),
    )
}

_EXTRAS = (
    "dora_scale", "dora_multiplier", "dora_log_multiplier", "dora_log_multiplier_row", "dora_log_multiplier_col",
    "oft_R.clipped_oft", "oft_R.cans_oft", "oft_R.cans_exp",
)


def detect(module: Module) -> tuple[str, str] | None:
    """Dialect id and the reason for it, by the tests of the format documentation in their order; None: no OFT in this module."""
    has, context = module.__contains__, module.context
    if has("oft_R.weight") and (has("lokr_w1") or has("lokr_w1_a")):
        return "F13", "oft_R.weight beside LoKr factors (DoKr-OFT)"
    if has("oft_rotation.weight"):
        return "F14", "oft_rotation.weight (Takenoko)"
    if has("oft_R.weight") or has("oft_embedding_R.weight"):
        if has("oft_embedding_R.weight") or context.peft:
            core = "oft_R.weight" if has("oft_R.weight") else "oft_embedding_R.weight"
            return peft.series(context)[2], f"{core} with {context.peft}" if context.peft else core
        if any(s.endswith("_metadata") for s in module.tensors):
            return "F13", "oft_R.weight with *_metadata values"
        extras = [s for s in _EXTRAS if has(s)]
        if extras:
            return "F12", f"oft_R.weight with {extras[0]}"
        if "oft_v2" in context.metadata.get("ss_network_module", ""):
            return "F14", "oft_R.weight, metadata names networks.oft_v2"
        return "F11", "oft_R.weight outside PEFT's key names"
    if has("boft_R"):
        return "F10", "boft_R"
    for suffix, dialect in (("road_theta", "F16"), ("hra_u", "F17"), ("psoft_R.weight", "F18")):
        if has(suffix):
            return dialect, suffix
    if has("oft_r"):
        return ("F7", "oft_r with oft_s") if has("oft_s") else ("F6", "oft_r without oft_s")
    if any(s.startswith("oft_blocks.") for s in module.tensors):
        return "F2", "numbered oft_blocks (split layers)"
    if has("oft_blocks"):
        if module.tensors["oft_blocks"].ndim == 4:
            return "F4", "oft_blocks with four dimensions"
        dotted = re.match(r"(diffusion_model|text_encoders)\..+\..+", module.name)
        if context.options.alpha_rule != "scaled" and dotted and not context.trainer_metadata and not has("rescale"):
            return "F5", "oft_blocks under dotted ComfyUI names without trainer metadata"
        if has("rescale"):
            return "F3", "oft_blocks with rescale"
        if module.name.startswith("oft_unet_") or context.metadata.get("ss_network_module", "").startswith("networks.oft"):
            return "F1", "oft_blocks under kohya's names"
        return "F3", "oft_blocks"
    if has("oft_diag"):
        if module.tensors["oft_diag"].ndim == 4:
            return "F4a", "oft_diag with four dimensions"
        if lycoris.is_additive(module):
            return "F3b", "oft_diag with a diagonal near 0 (additive)"
        return "F3a", "oft_diag with a diagonal near 1 (finished rotation)"
    if has("R"):
        return "F15", "attention processor keys of the paper's repository"
    found = next((s for s in comfy.DIFFERENCES if has(s)), None)
    return None if found is None else ("F5d", found)


def reader(module: Module, dialect: str) -> Maker:
    """The dialect's reader, with the additive differences that any of them may have beside its rotation.

    A whole weight beside a rotation is the layer's own (PEFT's ``base_layer.weight``), which the rotation turns: it comes first.
    """
    make = DIALECTS[dialect].read(module)
    beside = comfy.differences(module)
    own = [p for p in beside if p.op.whole]
    changes = [p for p in beside if not p.op.whole]
    if dialect not in ("F11", "F12", "F13", "F14"):
        foreign = [s for s in module.tensors if s in _EXTRAS or s.startswith(("lokr_", "lora_magnitude"))]
        if foreign:
            module.context.note(f"'{foreign[0]}' beside this kind of rotation has no known meaning and is not applied.")
    if dialect == "F5d" or not beside:
        return make
    return lambda shape: [*own, *make(shape), *changes]


def what_is_it(keys: list[str]) -> str:
    """What a file without readable OFT layers seems to be, in words."""
    if speaks_of_oft(keys):
        return "one whose OFT keys are not of a known form"
    signs = (
        ("hada_w1_a", "a LoHa adapter"), ("lokr_w", "a LoKr adapter"), (".b1.weight", "a GLoRA adapter"),
        ("vera_lambda", "a VeRA adapter"), ("on_input", "an IA3 adapter"),
        ("lora_down", "a LoRA"), ("lora_up", "a LoRA"), ("lora_A", "a LoRA"), ("lora_B", "a LoRA"),
        ("control_model.", "a ControlNet"), ("string_to_param", "a textual inversion embedding"), ("emb_params", "an embedding"),
        ("model.diffusion_model.", "a full checkpoint"), ("first_stage_model.", "a checkpoint or VAE"),
        ("input_blocks.", "a UNet"), ("double_blocks.", "a Flux-type model"), ("joint_blocks.", "an SD3-type model"),
        ("down_blocks.", "a diffusers model"), ("transformer_blocks.", "a diffusers transformer"),
        ("decoder.up", "a VAE"), ("text_model.", "a text encoder"),
    )
    for sign, name in signs:
        if any(sign in k for k in keys):
            return name
    return "not a file of a known kind"
