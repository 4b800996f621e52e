"""Write canonical rotations as files of other tools, and say why where a dialect cannot hold them.

A dialect can hold an adapter if it has the same side, the same map from generator to matrix and the same block layout; nothing is
approximated. Layers come as parameter key of a model -> LayerRotation; names follow the customs of each tool for that model family.
What was trained beside the rotations (biases, norms, whole layers) comes as parameter key -> Diff; see ``write_beside``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import all_or_none
from ..constraint import Strength
from ..errors import FormatError, ShapeError
from ..layer import Diff, LayerRotation
from ..limits import multiplier
from ..names import NameIndex, Spelling
from ..rotation import unpack_skew
from .write_beside import BaseWeights, Beside, beside_comfy, beside_lycoris, beside_peft, refused

#: Families whose files are customarily in diffusers names; all others in the names of the model's authors.
_DIFFUSERS_NAMED = ("sd1", "sd2")


@dataclass(frozen=True)
class Named:
    """One layer under the name that it gets in the file. conv: whether the weight has kernel dimensions."""

    name: str
    layer: LayerRotation
    conv: int


@dataclass(frozen=True)
class Writer:
    """One dialect that can be written.

    write: layers -> (tensors, PEFT config or None).   beside: adds differences to those tensors, or raises the reason why it cannot.
    side: which one it turns.   rows: whether it has row factors.   cayley_only: no other exact transform.   small_blocks: blocks are at
    least as many as large.
    """

    title: str
    write: Callable[[Mapping[str, LayerRotation], NameIndex], tuple[dict[str, Tensor], dict | None]]
    beside: Beside
    side: str
    rows: bool = False
    cayley_only: bool = True
    small_blocks: bool = False


def write_adapter(
    layers: Mapping[str, LayerRotation],
    index: NameIndex,
    path: str | os.PathLike,
    dialect: str,
    *,
    beside: Mapping[str, Diff] | None = None,
    base: BaseWeights | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write ``layers`` in one of ``WRITERS``; returns the file. ``peft`` writes a folder with adapter_config.json at ``path``.

    layers: parameter key of the model behind ``index`` -> rotation. beside: parameter key (weight or bias) -> what is added to it.
    base: parameter key -> the model's own value, for dialects that keep whole values where the adapter has differences, or the other
    way round. dtype: of generators and scales. The file appears whole or not at all. Raises FormatError with the reason if the
    dialect cannot hold the adapter.
    """
    if dialect not in WRITERS:
        raise FormatError("This dialect cannot be written", found=dialect, expected=", ".join(WRITERS))
    if not layers:
        raise FormatError("There are no layers to write")
    writer = WRITERS[dialect]
    tensors, config = writer.write(layers, index)
    if beside:
        writer.beside(dict(beside), layers, index, base, tensors, config)
    tensors = {k: (t.to(dtype) if t.is_floating_point() and t.numel() > 1 else t).contiguous() for k, t in tensors.items()}
    path, files = Path(path), {}
    if config is not None:
        files[path / "adapter_config.json"] = lambda p: Path(p).write_text(json.dumps(config, indent=2), "utf-8")
        path = path / "adapter_model.safetensors"
    files[path] = lambda p: save_file(tensors, p, dict(metadata or {}) or None)
    all_or_none(files)
    return path


# ---------------------------------------------------------------- what is asked of the layers


def _settled(layer: LayerRotation) -> Tensor:
    """The packed generator with its own limits applied, float32 (n or 1, b(b-1)/2)."""
    limit = multiplier(layer, Strength(), "cpu").expand(layer.stages, layer.stored)
    return (layer.generator.double() * limit.unsqueeze(-1)).float()[0]


def _require(
    layer: LayerRotation, title: str, key: str, *, side: str, kinds: tuple[str, ...], rows: bool, share: bool,
    terms: Container[int] = (5,),
) -> None:
    """Raises FormatError for the first thing that the dialect lacks."""
    words = {"in": "input", "out": "output"}
    faults = (
        (layer.subspace, "it turns a subspace of the channels, not blocks of them"),
        (layer.side != side, f"it turns the {words[layer.side]} side, these files the {words[side]} side"),
        (layer.kind not in kinds, f"its rotation is built as '{layer.kind}', these files know {', '.join(kinds)}"),
        (layer.kind.startswith("neumann") and layer.terms not in terms, f"its series has {layer.terms} terms, not 5"),
        (bool(layer.butterfly), "it is a butterfly of several factors"),
        (layer.added is not None, "it adds a difference before it turns"),
        (layer.col_scale is not None or layer.memory_view, "it is of a form that only its own tool reads"),
        (layer.size is not None, "its last block is cut"),
        (bool(layer.norm_of), "its row scale depends on the base model's row norms"),
        (layer.row_scale is not None and not rows, "it has row scales"),
        (layer.stored == 1 and layer.count > 1 and not share, "one block is shared along the layer"),
    )
    for wrong, why in faults:
        if wrong:
            raise refused(title, key, why)


# ---------------------------------------------------------------- names


def _diffusers(spelling: Spelling, index: NameIndex) -> list[tuple[str, tuple[int, int] | None, bool]]:
    """The weight's names in diffusers' layout, as in ``Spelling.others``; its own where the model has no other layout."""
    if spelling.part != "unet":
        return [(_encoder_path(spelling), None, False)]
    own = [(spelling.path, None, False)]
    if spelling.diffusers:
        return own
    return _one_of_each(spelling, index) or own


#: What U-Nets read that label classes: the width of SD 2.x's text (its variants for image embeddings). SDXL's and its refiner's is wider.
_LABELLED_WIDTH = 1024
_TEXT_KEY = re.compile(r"attn2\.to_k\.weight$")


def _one_of_each(spelling: Spelling, index: NameIndex) -> list[tuple[str, tuple[int, int] | None, bool]]:
    """The names in the other layout, one where the whole weight has several: each of them would be read as a layer of its own.

    ``label_emb`` is such a weight: diffusers calls it ``class_embedding`` where it embeds class labels, ``add_embedding`` in SDXL.
    """
    whole = [other for other in spelling.others if other[1] is None]
    if len(whole) < 2:
        return list(spelling.others)
    widths = {shape[1] for key, shape in index.shapes.items() if len(shape) == 2 and _TEXT_KEY.search(key)}
    labels = widths == {_LABELLED_WIDTH} and index.family != "svd"
    kind = "class_embedding." if labels else "add_embedding."
    return [next((other for other in whole if other[0].startswith(kind)), whole[0])]


def _encoder_path(spelling: Spelling) -> str:
    """Hugging Face's path inside a text encoder."""
    return spelling.path if spelling.part == "te3" else f"text_model.{spelling.path}"


def _parts(
    layers: Mapping[str, LayerRotation], index: NameIndex, title: str, names: Callable[[str, Spelling], list],
) -> Iterator[Named]:
    """Every layer under its names; layers whose parts have names of their own are taken apart."""
    for key, layer in layers.items():
        spelling = index.spelling(key)
        if spelling is None:
            raise refused(title, key, "this parameter is not a layer of the model")
        conv = max(0, len(index.shapes[key]) - 2)
        for name, rows, swap in names(key, spelling):
            if swap and (layer.side == "out" or layer.row_scale is not None):
                raise refused(title, key, "its rows are stored in another order there")
            try:
                part = layer if rows is None else layer.rows_slice(*rows, module=key)
            except ShapeError as error:
                raise refused(title, key, "its blocks run across layers that are separate there") from error
            yield Named(name, part, conv)


def _kohya_names(index: NameIndex, unet: str) -> Callable[[str, Spelling], list]:
    """kohya's spelling: diffusers names for SD 1.x and 2.x, the authors' names for everything else, underscores."""

    def names(key: str, spelling: Spelling) -> list:
        if spelling.part == "unet":
            found = _diffusers(spelling, index) if index.family in _DIFFUSERS_NAMED else [(spelling.path, None, False)]
            return [(unet + n.replace(".", "_"), rows, swap) for n, rows, swap in found]
        te = "lora_te_" if index.family in _DIFFUSERS_NAMED else f"lora_{spelling.part}_"
        return [(te + _encoder_path(spelling).replace(".", "_"), None, False)]

    return names


_ENCODERS = {"te1": "clip_l", "te2": "clip_g", "te3": "t5xxl"}
_LIVE_ENCODER = re.compile(r"(?:text_encoders\.)?(\w+)\.transformer\.")


def _comfy_names(index: NameIndex) -> Callable[[str, Spelling], list]:
    """ComfyUI's dotted names. A text encoder is called as in the model at hand, else as its family's is: SD 2.x has a CLIP-H."""

    def names(key: str, spelling: Spelling) -> list:
        if spelling.part == "unet":
            return [(f"diffusion_model.{spelling.path}", None, False)]
        live = _LIVE_ENCODER.match(key)
        by_family = "clip_h" if (index.family, spelling.part) == ("sd2", "te1") else _ENCODERS[spelling.part]
        encoder = live[1] if live and live[1] != "cond_stage_model" else by_family
        return [(f"text_encoders.{encoder}.transformer.{_encoder_path(spelling)}", None, False)]

    return names


def _peft_names(index: NameIndex) -> Callable[[str, Spelling], list]:
    def names(key: str, spelling: Spelling) -> list:
        return [(f"base_model.model.{n}", rows, swap) for n, rows, swap in _diffusers(spelling, index)]

    return names


def _no_place(title: str, why: str) -> Beside:
    """For dialects without a place for differences."""

    def refuse(diffs: Mapping[str, Diff], *_: object) -> None:
        raise refused(title, next(iter(diffs)), f"it has a trained bias or a layer that was trained whole; {why}")

    return refuse


# ---------------------------------------------------------------- the dialects


def _square(layer: LayerRotation) -> Tensor:
    """``oft_blocks`` (n, b, b): upper triangles A with A - A^T the file's Q, where M = cayley(Q)^T."""
    return torch.triu(unpack_skew(-_settled(layer), layer.block), 1)


def _write_lycoris(layers: Mapping[str, LayerRotation], index: NameIndex) -> tuple[dict[str, Tensor], None]:
    out: dict[str, Tensor] = {}
    for part in _parts(layers, index, "LyCORIS", _kohya_names(index, "lora_unet_")):
        _require(part.layer, "LyCORIS", part.name, side="out", kinds=("cayley",), rows=True, share=False)
        if part.layer.block > part.layer.count:
            raise refused("LyCORIS", part.name, f"LyCORIS reads blocks only where they are at least as many as large; "
                          f"here {part.layer.count} of {part.layer.block}")
        out[f"{part.name}.oft_blocks"] = _square(part.layer)
        out[f"{part.name}.alpha"] = torch.tensor(0.0)
        if part.layer.row_scale is not None:
            out[f"{part.name}.rescale"] = part.layer.row_scale.view(-1, *[1] * (1 + part.conv))
    return out, None


def _write_kohya(layers: Mapping[str, LayerRotation], index: NameIndex) -> tuple[dict[str, Tensor], None]:
    if index.family in ("flux", "flux2", "sd3"):
        raise refused("kohya", next(iter(layers)), f"that tool's OFT network does not know {index.family}")
    out: dict[str, Tensor] = {}
    parts = list(_parts(layers, index, "kohya", _kohya_names(index, "oft_unet_")))
    counts = {p.layer.count for p in parts}
    for part in parts:
        _require(part.layer, "kohya", part.name, side="out", kinds=("cayley",), rows=False, share=False)
        if not part.name.startswith("oft_unet_"):
            raise refused("kohya", part.name, "it has text encoder layers")
        if len(counts) > 1:
            raise refused("kohya", part.name, f"they need one number of blocks in all layers, here {sorted(counts)}")
        out[f"{part.name}.oft_blocks"] = _square(part.layer)
    # One limit, alpha times output size, wide enough to be free; that tool reads the first alpha for all layers.
    use = max(float(p.layer.generator.norm()) * 2**0.5 / p.layer.axis for p in parts)
    for part in parts:
        out[f"{part.name}.alpha"] = torch.tensor(max(1.0, 2 * use))
    return out, None


def _write_comfy(layers: Mapping[str, LayerRotation], index: NameIndex) -> tuple[dict[str, Tensor], None]:
    out: dict[str, Tensor] = {}
    for part in _parts(layers, index, "ComfyUI core", _comfy_names(index)):
        _require(part.layer, "ComfyUI core", part.name, side="out", kinds=("cayley",), rows=False, share=False)
        out[f"{part.name}.oft_blocks"] = _square(part.layer)
        out[f"{part.name}.alpha"] = torch.tensor(0.0)
    return out, None


def _oft_v2_names(index: NameIndex) -> Callable[[str, Spelling], list]:
    if index.family not in (*_DIFFUSERS_NAMED, "sdxl"):
        return _comfy_names(index)

    def names(key: str, spelling: Spelling) -> list:
        if spelling.part != "unet":
            return _kohya_names(index, "")(key, spelling)
        return [("lora_unet_" + n.replace(".", "_"), rows, swap) for n, rows, swap in _diffusers(spelling, index)]

    return names


def _write_oft_v2(
    layers: Mapping[str, LayerRotation], index: NameIndex, terms: Container[int] = (5,),
) -> tuple[dict[str, Tensor], None]:
    out: dict[str, Tensor] = {}
    for part in _parts(layers, index, "OFT v2", _oft_v2_names(index)):
        layer = part.layer
        _require(
            layer, "OFT v2", part.name, side="in", kinds=("neumann", "cayley", "expm"), rows=True, share=True, terms=terms,
        )
        if layer.row_scale is not None and float(layer.row_scale.min()) <= 0:
            raise refused("OFT v2", part.name, "its row scales are not all positive")
        out[f"{part.name}.oft_R.weight"] = _settled(layer) * (-1.0 if part.conv else 1.0)
        if layer.kind == "neumann" and layer.terms != 5:
            out[f"{part.name}.oft_R.neumann_terms"] = torch.tensor(layer.terms)
        if layer.kind != "neumann":
            out[f"{part.name}.oft_R.{'cans_oft' if layer.kind == 'cayley' else 'cans_exp'}"] = torch.tensor(True)
        if layer.row_scale is not None:
            out[f"{part.name}.dora_log_multiplier"] = layer.row_scale.log()
    return out, None


def _write_own(layers: Mapping[str, LayerRotation], index: NameIndex) -> tuple[dict[str, Tensor], None]:
    """OFT v2 with what only this pack reads: a series of another length (``oft_R.neumann_terms``), and differences."""
    return _write_oft_v2(layers, index, range(1, 1000))


#: Last names of the text encoders' embeddings, for which PEFT has keys of its own.
_EMBEDDINGS = ("token_embedding", "position_embedding", "embed_tokens", "shared")


def _write_peft(layers: Mapping[str, LayerRotation], index: NameIndex) -> tuple[dict[str, Tensor], dict]:
    parts = list(_parts(layers, index, "PEFT", _peft_names(index)))
    for part in parts:
        _require(part.layer, "PEFT", part.name, side="in", kinds=("neumann", "cayley"), rows=False, share=True, terms=range(1, 1000))
    kinds, terms = {p.layer.kind for p in parts}, {p.layer.terms for p in parts if p.layer.kind == "neumann"}
    shares = {p.layer.stored == 1 for p in parts if p.layer.count > 1}
    components = {index.spelling(key).part for key in layers}
    for mixed, what in ((kinds, "ways to build the rotation"), (terms, "series lengths"), (shares, "block sharing")):
        if len(mixed) > 1:
            raise refused("PEFT", parts[0].name, f"its layers differ in their {what}, one config serves all")
    if len(components) > 1:
        raise refused("PEFT", parts[0].name, "it has layers of several models; PEFT keeps one folder for each")
    exact = kinds == {"cayley"}
    # The exact branch of PEFT builds the transpose of what its series approximates.
    tensors = {}
    for p in parts:
        # Embeddings are rotated as E R, all else as W R^T.
        leaf, sign = ("oft_embedding_R", -1.0) if p.name.rsplit(".", 1)[-1] in _EMBEDDINGS else ("oft_R", 1.0)
        tensors[f"{p.name}.{leaf}.weight"] = _settled(p.layer) * (-sign if exact else sign)
    size = max(p.layer.block for p in parts)
    for p in parts:
        if peft_block_size(p.layer.axis, size) != p.layer.block:
            raise refused("PEFT", p.name, f"one block size serves all layers there: {size} would become "
                          f"{peft_block_size(p.layer.axis, size)} here, not {p.layer.block}")
    config = {
        "peft_type": "OFT", "peft_version": "0.18.0", "auto_mapping": None, "base_model_name_or_path": None, "revision": None,
        "task_type": None, "inference_mode": True, "r": 0, "oft_block_size": size, "module_dropout": 0.0,
        "target_modules": sorted(p.name.removeprefix("base_model.model.") for p in parts), "exclude_modules": None,
        "fan_in_fan_out": False, "bias": "none", "init_weights": True, "layers_to_transform": None, "layers_pattern": None,
        "modules_to_save": None, "coft": False, "eps": 6e-5, "block_share": shares == {True},
        "use_cayley_neumann": not exact, "num_cayley_neumann_terms": terms.pop() if terms else 5,
    }
    return tensors, config


def peft_block_size(features: int, wanted: int) -> int:
    """The block size that PEFT and OneTrainer use for a layer of ``features`` inputs: the nearest divisor, the smaller of two."""
    if wanted >= features:
        return features
    lower = next(b for b in range(wanted, 0, -1) if features % b == 0)
    higher = next(b for b in range(wanted, features + 1) if features % b == 0)
    return lower if wanted - lower <= higher - wanted else higher


WRITERS: dict[str, Writer] = {
    "oft_v2": Writer("OneTrainer / OFT v2", _write_oft_v2, _no_place("OFT v2", "OneTrainer reads rotations only"), "in", rows=True, cayley_only=False),
    "oft_v2_plus": Writer(
        "OFT v2 with extras of this pack", _write_own,
        lambda diffs, layers, index, *more: beside_comfy(diffs, layers, index, *more, names=_oft_v2_names(index), core=False),
        "in", rows=True, cayley_only=False,
    ),
    "peft": Writer(
        "PEFT (folder)", _write_peft,
        lambda diffs, layers, index, *more: beside_peft(diffs, layers, index, *more, names=_peft_names(index)), "in",
    ),
    "lycoris": Writer(
        "LyCORIS Diag-OFT", _write_lycoris,
        lambda diffs, layers, index, *more: beside_lycoris(diffs, layers, index, *more, names=_kohya_names(index, "lora_unet_")),
        "out", rows=True, small_blocks=True,
    ),
    "kohya": Writer("kohya networks.oft", _write_kohya, _no_place("kohya", "that tool's OFT network has rotations only"), "out"),
    "comfy": Writer(
        "ComfyUI core", _write_comfy,
        lambda diffs, layers, index, *more: beside_comfy(diffs, layers, index, *more, names=_comfy_names(index), core=True), "out",
    ),
}


def lora_parts(key: str, delta: Tensor, index: NameIndex) -> Iterator[tuple[str, Tensor]]:
    """A change of a parameter as a LoRA of kohya's names has it: (module, change of its weight), or (module.diff or .diff_b, change).

    Layers that are one here and several under those names are taken apart. Raises FormatError for what has no name.
    """
    weight, of_bias = key, False
    if index.spelling(key) is None and key.endswith("bias"):
        of_bias = True
        weight = key.removesuffix("bias") + "weight"
    spelling = index.spelling(weight)
    if spelling is None:
        raise refused("LoRA", key, "this parameter is not a layer of the model")
    for name, rows, swap in _kohya_names(index, "lora_unet_")(weight, spelling):
        part = delta if rows is None else delta[rows[0] : sum(rows)]
        part = torch.cat(part.chunk(2)[::-1]) if swap else part
        yield (f"{name}.diff_b" if of_bias else f"{name}.diff" if part.ndim < 2 else name), part.contiguous()

