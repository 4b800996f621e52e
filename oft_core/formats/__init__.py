"""The table of dialects: which suffixes a layer has decides which reader it gets (first hit wins)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from . import comfy, kohya, lycoris, onetrainer, paper, peft
from .common import Context, Maker, Module, Piece, ReadOptions

__all__ = ["DIALECTS", "Context", "Dialect", "Maker", "Module", "Piece", "ReadOptions", "detect", "group", "reader", "what_is_it"]


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
    )
}

_DOTTED = (
    "oft_R.weight", "oft_R.scaled_oft", "oft_R.clipped_oft", "oft_R.cans_oft", "oft_R.cans_exp",
    "oft_embedding_R.weight", "oft_rotation.weight", "oft_blocks", r"oft_blocks\.(?:0|[1-9][0-9]{0,3})", "oft_diag", "alpha", "rescale",
    "oft_r", "oft_s", "boft_R", "boft_s", "boft_P",
    "dora_scale", "initial_norm", "dora_multiplier", "dora_log_multiplier", "dora_log_multiplier_row", "dora_log_multiplier_col",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "lora_magnitude_vector.weight",
    "diff", "diff_b", "w_norm", "b_norm", "oft_R.neumann_terms", "I", r"\w+_metadata", r"oft_\w+_buffer",
    # paper repository, below ...processor.to_q_oft
    "R", "cross_attention_dim", "hidden_size", "oft_eps", "oft_is_coft", "rows", "cols",
)
#: OneTrainer glued these to the flattened module name.
_GLUED = ("initial_norm", "dora_scale", "dora_multiplier", "dora_log_multiplier")
_KEY = re.compile(
    r"(?P<module>.+?)(?:\.(?P<suffix>" + "|".join(sorted(_DOTTED, key=len, reverse=True)) + r")|_(?P<glued>"
    + "|".join(sorted(_GLUED, key=len, reverse=True)) + r"))$"
)
_PAPER = re.compile(r"^(?P<block>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_oft$")
#: PEFT keeps trained biases and modules as they are in the model: all of a parameter, under the model's own name.
_WHOLE = re.compile(
    r"base_model\.model\.(?P<module>(?!.*(?:lora_|original_module)).+?)(?:\.base_layer|\.modules_to_save)?\.(?P<param>weight|bias)$"
)
_CORE = ("oft_R.weight", "oft_rotation.weight", "oft_embedding_R.weight", "boft_R", "oft_r", "oft_blocks", "oft_diag", "R")
_EXTRAS = (
    "dora_scale", "dora_multiplier", "dora_log_multiplier", "dora_log_multiplier_row", "dora_log_multiplier_col",
    "oft_R.clipped_oft", "oft_R.cans_oft", "oft_R.cans_exp",
)


def group(tensors: Mapping[str, Tensor], context: Context) -> tuple[dict[str, Module], list[str]]:
    """Sort keys into modules -> (modules by name, keys that are not understood).

    ``.default`` segments of live PEFT state dicts are noise; mangled spellings of one module (dots instead of underscores) meet.
    """
    names: dict[str, str] = {}
    modules: dict[str, Module] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        plain = re.sub(r"\.default(?=\.|$)", "", key)
        match = _KEY.match(plain)
        if match is not None:
            name, suffix = match["module"], match["suffix"] or match["glued"]
        elif context.peft_keys and (match := _WHOLE.match(plain)):
            name, suffix = f"base_model.model.{match['module']}", {"weight": "whole", "bias": "whole_b"}[match["param"]]
        else:
            # PEFT also writes the frozen original of a module that was trained whole.
            if not (context.peft_keys and ".original_module." in plain):
                unknown.append(key)
            continue
        attention = _PAPER.match(name)
        if attention is not None:
            name = f"{attention['block']}.{attention['layer']}" + (".0" if attention["layer"] == "to_out" else "")
        elif suffix in ("R", "cross_attention_dim", "hidden_size", "oft_eps", "oft_is_coft", "rows", "cols"):
            unknown.append(key)
            continue
        flat = name.replace(".", "_")
        known = names.setdefault(flat, name)
        module = modules.setdefault(flat, Module(known, {}, context))
        if any(suffix == c or suffix.startswith("oft_blocks.") for c in _CORE):
            module.name = name
        module.tensors[suffix] = tensor
    return {m.name: m for m in modules.values()}, unknown


def detect(module: Module) -> tuple[str, str] | None:
    """Dialect id and the reason for it, by the tests of the format documentation in their order; None: no OFT in this module."""
    has, context = module.__contains__, module.context
    if has("oft_R.weight") and (has("lokr_w1") or has("lokr_w1_a")):
        return "F13", "oft_R.weight beside LoKr factors (DoKr-OFT)"
    if has("oft_rotation.weight"):
        return "F14", "oft_rotation.weight (Takenoko)"
    if has("oft_R.weight") or has("oft_embedding_R.weight"):
        if has("oft_embedding_R.weight") or context.peft_keys:
            return peft.series(context)[2], "oft_R.weight under PEFT's key names"
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
    """What a file without OFT layers seems to be, in words."""
    signs = (
        ("hada_w1_a", "a LoHa adapter"), ("lokr_w", "a LoKr adapter"), (".b1.weight", "a GLoRA adapter"),
        ("vera_lambda", "a VeRA adapter"), ("hra_u", "an HRA adapter"), ("on_input", "an IA3 adapter"),
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
