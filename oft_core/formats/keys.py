"""Tensor names sorted into modules: suffixes of every dialect, wrappers, names of PEFT adapters, and what is the base model's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import FormatError
from ..names.spelling import unwrapped
from .common import Context, Module

_DOTTED = (
    "oft_R.weight", "oft_R.scaled_oft", "oft_R.clipped_oft", "oft_R.cans_oft", "oft_R.cans_exp",
    "oft_embedding_R.weight", "oft_rotation.weight", "oft_blocks", r"oft_blocks\.(?:0|[1-9][0-9]{0,3})", "oft_diag", "alpha", "rescale",
    "oft_r", "oft_s", "boft_R", "boft_s", "boft_P",
    "road_theta", "road_alpha", "hra_u", "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b",
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
#: A live PEFT model has the adapter's name behind its parameters. Names have no dots: they are names of modules.
_NAMED = re.compile(
    r"\.(?:(?P<group>oft_R|oft_embedding_R|psoft_R)\.(?P<of_group>[^.]+)\.(?P<leaf>weight|vector_[ab])"
    r"|(?P<single>oft_r|oft_s|boft_R|boft_s|hra_u|road_theta|road_alpha)\.(?P<of_single>[^.]+))$"
)
#: PEFT keeps trained biases and modules as they are in the model: all of a parameter, under the model's own name.
_WHOLE = re.compile(r"(?P<module>(?!.*(?:lora_|original_module)).+?)(?P<own>\.base_layer)?\.(?P<param>weight|bias)$")
_SAVED = re.compile(r"\.modules_to_save(?:\.(?P<adapter>[^.]+))?(?=\.)")
_CORE = ("oft_R.weight", "oft_rotation.weight", "oft_embedding_R.weight", "boft_R", "oft_r", "oft_blocks", "oft_diag", "R", "road_theta", "hra_u", "psoft_R.weight")
_CORE_KEY = re.compile(
    r"\.(?:oft_R\.(?:weight|scaled_oft|clipped_oft|cans_oft|cans_exp)|oft_rotation\.weight|oft_embedding_R\.weight|boft_R|oft_r"
    r"|oft_blocks(?:\.\d+)?|oft_diag|road_theta|hra_u|psoft_R\.weight)(?:\.default)?$|_oft\.R$"
)
_DEFAULT = re.compile(r"\.default(?=\.|$)")
#: Anything that speaks of OFT, whether or not it is understood.
_SPEAKS_OF_OFT = re.compile(r"(?:^|[._])b?oft(?:v2)?(?:[._]|$)", re.IGNORECASE)
#: Prefixes that a PEFT model has around the model that it wraps, for files whose suffixes do not tell.
_WRAPPED = re.compile(r"model\.(?!diffusion_model\.)")


def speaks_of_oft(keys: Iterable[str]) -> list[str]:
    """The keys with ``oft`` or ``boft`` as a word of their own."""
    return [k for k in keys if _SPEAKS_OF_OFT.search(k)]


def holds_oft(keys: Iterable[str]) -> bool:
    """Whether one of the names is that of a tensor that stores rotations, in any dialect."""
    return any(_CORE_KEY.search(adapter_of(unwrapped(key))[0]) for key in keys)


def adapter_of(key: str) -> tuple[str, str]:
    """(key without the name of a PEFT adapter, that name), "" for keys without one."""
    match = _NAMED.search(key)
    if match is None:
        return key, ""
    if match["group"]:
        return f"{key[: match.start()]}.{match['group']}.{match['leaf']}", match["of_group"]
    return f"{key[: match.start()]}.{match['single']}", match["of_single"]


def peft_reason(keys: Iterable[str], context: Context, config_counts: bool) -> str:
    """Why these are PEFT's key names, "" if they are not.   config_counts: whether an adapter_config lies beside the file, for it."""
    writer = context.options.oft_writer
    if writer != "auto":
        return "read option oft_writer" if writer == "peft" else ""
    plain = [unwrapped(k) for k in keys]
    if any(k.startswith("base_model.model.") for k in plain):
        return "PEFT's key names"
    if any(adapter_of(k)[1] for k in plain):
        return "an adapter's name behind it, as in PEFT's models"
    if any(".base_layer." in k for k in plain):
        return "PEFT's base_layer beside it"
    if config_counts:
        return "PEFT's adapter_config.json"
    cores = [k for k in plain if k.endswith(".oft_R.weight")]
    if cores and all(map(_WRAPPED.match, cores)) and not any(k.startswith(("ot_", "modelspec.", "ss_")) for k in context.metadata):
        return "the prefix 'model.' of PEFT's models"
    return ""


def chosen_adapter(names: Iterable[str], context: Context) -> str:
    """Which of the adapters in a file is read. Raises FormatError where that is not clear."""
    found, wanted = sorted(set(names) - {""}), context.options.adapter_name
    if wanted and wanted not in found:
        raise FormatError(
            "The file holds no adapter of this name", file=context.file, found=", ".join(found[:20]) or "no names of adapters", expected=wanted
        )
    if len(found) > 1 and not wanted:
        raise FormatError(
            "The file holds several adapters", file=context.file, found=", ".join(found[:20]), expected="one",
            hint="Choose one: read option adapter_name (--adapter-name NAME).",
        )
    return wanted or (found[0] if found else "")


def group(tensors: Mapping[str, Tensor], context: Context) -> tuple[dict[str, Module], list[str]]:
    """Sort keys into modules -> (modules by name, keys that are not understood).

    Wrappers of compiled and distributed models and names of PEFT adapters are noise; mangled spellings of one module (dots instead
    of underscores) meet. Only the adapter's tensors are taken out of ``tensors``: where the state of a whole PEFT model was saved,
    the base model's stay where they are, and ``context.base`` counts them. Raises FormatError for a choice of adapters.
    """
    plain = {key: adapter_of(unwrapped(key)) for key in tensors}
    wanted = chosen_adapter((name for _, name in plain.values()), context)
    whole_model = _is_whole_model(plain.values()) if context.peft else False
    names: dict[str, str] = {}
    modules: dict[str, Module] = {}
    unknown: list[str] = []
    turned = {key for key, _ in plain.values() if key.endswith(".oft_embedding_R.weight")}
    trained: set[tuple[str, str]] = set()
    biases = 0
    for key, (spelled, adapter) in plain.items():
        if adapter and adapter != wanted:
            continue
        saved = _SAVED.search(spelled) if context.peft else None
        if saved is not None:
            if wanted and saved["adapter"] and saved["adapter"] != wanted:
                continue
            spelled = spelled[: saved.start()] + spelled[saved.end() :]
        if ".default" in spelled:
            spelled = _DEFAULT.sub("", spelled)
        match = _KEY.match(spelled)
        if match is not None and not (whole_model and saved is None and match["suffix"] == "alpha"):
            name, suffix = match["module"], match["suffix"] or match["glued"]
        elif not context.peft:
            unknown.append(key)
            continue
        elif ".original_module." in spelled:  # the frozen original of a module that was trained whole
            context.base += whole_model
            continue
        else:
            match = _WHOLE.match(spelled)
            bias = match is not None and match["param"] == "bias"
            if whole_model and saved is None:
                biases += bias
                own = match is not None and bool(match["own"])
                embedding = own and f"{match['module']}.oft_embedding_R.weight" in turned
                if not (embedding or _counts(context, own, bias)):
                    context.base += 1
                    continue
            if match is None:
                unknown.append(key)
                continue
            name, suffix = match["module"], "whole_b" if bias else "whole"
        attention = _PAPER.match(name)
        if attention is not None:
            name = f"{attention['block']}.{attention['layer']}" + (".0" if attention["layer"] == "to_out" else "")
        elif suffix in ("R", "cross_attention_dim", "hidden_size", "oft_eps", "oft_is_coft", "rows", "cols"):
            unknown.append(key)
            continue
        flat = name.replace(".", "_")
        known = names.setdefault(flat, name)
        module = modules.setdefault(flat, Module(known, {}, context))
        if suffix in _CORE or suffix.startswith("oft_blocks."):
            module.name = name
        if suffix in module.tensors and saved is None:
            # The frozen original of a module that was trained whole; else the same tensor of the same layer in two spellings.
            if (flat, suffix) not in trained:
                unknown.append(key)
            continue
        if saved is not None:
            trained.add((flat, suffix))
        module.tensors[suffix] = tensors[key]
    if context.base:
        about = f"{context.base} tensors of the base model stand beside the adapter, as in the saved state of a PEFT model, and are not applied"
        if biases and context.options.peft_base == "auto" and context.config is None:
            about += "; if biases were trained too (bias='all' or 'oft_only'), use read option peft_base=apply"
        context.note(about + ".")
    return {m.name: m for m in modules.values()}, unknown


def _is_whole_model(plain: Iterable[tuple[str, str]]) -> bool:
    """Whether the base model's frozen weights stand in the file: ``base_layer.weight`` beside rotations, but for embeddings alone.

    PEFT's own saver writes the ``base_layer`` of embeddings that it turns, for their vocabulary may have grown, and trained biases.
    """
    plain = list(plain)
    own = {key.removesuffix(".base_layer.weight") for key, _ in plain if key.endswith(".base_layer.weight")}
    if not own:
        return False
    turned = {key.removesuffix(".oft_embedding_R.weight"): name for key, name in plain if key.endswith(".oft_embedding_R.weight")}
    return any(key not in turned or turned[key] for key in own)


def _counts(context: Context, own: bool, bias: bool) -> bool:
    """Whether a tensor of the base model in a saved state is applied.   own: it is that of a layer with a rotation."""
    if context.options.peft_base != "auto":
        return context.options.peft_base == "apply"
    trained = (context.config or {}).get("bias")
    return bias and (trained == "all" or str(trained).endswith("_only") and own)
