"""The same weights under other names: U-Net (ldm and diffusers), MMDiT models, CLIP (Hugging Face and open_clip).

Everything here is derived from which modules a model has, never from sizes of known models: blocks are numbered by walking them, and
the rows of a fused matrix come from the shapes. Names that the structure does not settle (a gap in the numbering, a fused matrix with
a part missing) are left out, so they stay "not found" and never point to a wrong module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]  # dotted module path -> weight shape
Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Alias:
    """`name` in the other layout is these modules (or rows of them), stacked; `swap`: the two halves of the rows are exchanged."""

    name: str
    parts: tuple[tuple[str, Rows], ...]
    swap: bool = False


def other_names(shapes: Shapes) -> Iterator[Alias]:
    """Every name that the modules of one part (a diffusion model or a text encoder) have in the layouts it is not stored in."""
    yield from _unet_names(shapes)
    for layout in LAYOUTS:
        yield from layout.names(shapes)


# ---------------------------------------------------------------------------------------------------------------------
# U-Net

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_TOP = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "class_embedding.linear_1"),
    ("label_emb.0.2", "class_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
_LDM_BLOCK = re.compile(r"((?:in|out)put_blocks\.\d+\.\d+|middle_block\.\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+)\.(.+)")


def _unet_names(shapes: Shapes) -> Iterator[Alias]:
    if any(p.startswith(("input_blocks.", "output_blocks.")) for p in shapes):
        contents = _contents(shapes, _LDM_BLOCK)
        blocks = dict(_walk_ldm(contents))
        top, resnet = [(ldm, other) for ldm, other in _UNET_TOP], _RESNET
    elif any(p.startswith(("down_blocks.", "up_blocks.")) for p in shapes):
        contents = _contents(shapes, _DIFFUSERS_BLOCK)
        blocks = {diffusers: ldm for ldm, diffusers in _walk_diffusers(contents)}
        top, resnet = [(other, ldm) for ldm, other in _UNET_TOP], {v: k for k, v in _RESNET.items()}
    else:
        return
    for here, there in top:
        if here in shapes:
            yield Alias(there, ((here, None),))
    for block, inside in contents.items():
        if block not in blocks:
            continue
        for path in inside:
            if path in ("op", "conv"):  # a down- or upsampler: one convolution, with its own word in either layout
                there = blocks[block] + (".op" if "input_blocks" in blocks[block] else ".conv")
            else:
                there = f"{blocks[block]}.{resnet.get(path, path)}"
            yield Alias(there, ((f"{block}.{path}", None),))


def _contents(shapes: Shapes, block: re.Pattern[str]) -> dict[str, set[str]]:
    """block -> the module paths inside it"""
    found: dict[str, set[str]] = {}
    for path in shapes:
        if match := block.fullmatch(path):
            found.setdefault(match.group(1), set()).add(match.group(2))
    return found


def _is_attention(inside: set[str]) -> bool:
    return any(p.startswith(("proj_in", "transformer_blocks.")) for p in inside)


def _walk_ldm(blocks: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """(ldm block, diffusers block): ldm counts straight through, diffusers starts a new block after every change of size."""
    level = depth = 0
    n = 1  # block 0 is conv_in
    while f"input_blocks.{n}.0" in blocks or f"input_blocks.{n}.1" in blocks:
        if "op" in blocks.get(f"input_blocks.{n}.0", ()):
            yield f"input_blocks.{n}.0", f"down_blocks.{level}.downsamplers.0"
            level, depth = level + 1, 0
        else:
            yield f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{depth}"
            yield f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{depth}"
            depth += 1
        n += 1
    resnets = attentions = n = 0
    while f"middle_block.{n}" in blocks:
        if _is_attention(blocks[f"middle_block.{n}"]):
            yield f"middle_block.{n}", f"mid_block.attentions.{attentions}"
            attentions += 1
        else:
            yield f"middle_block.{n}", f"mid_block.resnets.{resnets}"
            resnets += 1
        n += 1
    level = depth = n = 0
    while f"output_blocks.{n}.0" in blocks or f"output_blocks.{n}.1" in blocks:
        yield f"output_blocks.{n}.0", f"up_blocks.{level}.resnets.{depth}"
        next_level = False
        for sub in (1, 2):
            inside = blocks.get(f"output_blocks.{n}.{sub}", set())
            if "conv" in inside:
                yield f"output_blocks.{n}.{sub}", f"up_blocks.{level}.upsamplers.0"
                next_level = True
            elif inside:
                yield f"output_blocks.{n}.{sub}", f"up_blocks.{level}.attentions.{depth}"
        level, depth = (level + 1, 0) if next_level else (level, depth + 1)
        n += 1


def _walk_diffusers(blocks: Mapping[str, set[str]]) -> Iterator[tuple[str, str]]:
    """(ldm block, diffusers block), walking the diffusers names. Stops where the next ldm number cannot be known."""

    def layers(side: str, level: int) -> Iterator[int]:
        depth = 0
        while f"{side}.{level}.resnets.{depth}" in blocks or f"{side}.{level}.attentions.{depth}" in blocks:
            yield depth
            depth += 1

    level, n = 0, 1
    while True:
        for depth in layers("down_blocks", level):
            yield f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{depth}"
            yield f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{depth}"
            n += 1
        if f"down_blocks.{level}.downsamplers.0" not in blocks:
            break
        yield f"input_blocks.{n}.0", f"down_blocks.{level}.downsamplers.0"
        level, n = level + 1, n + 1
    mid_attention = "mid_block.attentions.0" in blocks
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield ("middle_block.2" if mid_attention else "middle_block.1"), "mid_block.resnets.1"
    level = n = 0
    while True:
        last = -1
        for last in layers("up_blocks", level):
            yield f"output_blocks.{n}.0", f"up_blocks.{level}.resnets.{last}"
            yield f"output_blocks.{n}.1", f"up_blocks.{level}.attentions.{last}"
            n += 1
        if last < 0 or f"up_blocks.{level}.upsamplers.0" not in blocks:
            break
        place = 2 if f"up_blocks.{level}.attentions.{last}" in blocks else 1
        yield f"output_blocks.{n - 1}.{place}", f"up_blocks.{level}.upsamplers.0"
        level += 1


# ---------------------------------------------------------------------------------------------------------------------
# Models that are a list of equal blocks: tables "original name" -> "name(s) in the other layout"

Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Blocks:
    """A list of equal blocks: `original`.N.<key> is `other`.N.<value>; several values are the parts of one fused matrix, in row order."""

    original: str
    other: str
    table: Table


@dataclass(frozen=True)
class Layout:
    """Two spellings of one architecture.

    original_has, other_has: patterns; a model uses that spelling if each of them matches the start of one of its module paths.
    swapped: original names whose two halves of rows (shift and scale) are exchanged in the other spelling.
    """

    original_has: tuple[str, ...]
    other_has: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    top: Table
    swapped: frozenset[str] = frozenset()

    def names(self, shapes: Shapes) -> Iterator[Alias]:
        """Every alias of a model that has one of the two spellings."""
        if _has_all(shapes, self.original_has):
            yield from self._of_original(shapes)
        elif _has_all(shapes, self.other_has):
            yield from self._of_other(shapes)

    def _of_original(self, shapes: Shapes) -> Iterator[Alias]:
        for original, (other,) in self.top.items():
            if original in shapes:
                yield Alias(other, ((original, None),), original in self.swapped)
        for blocks in self.blocks:
            for n in _numbers(shapes, blocks.original):
                for original, others in blocks.table.items():
                    path = f"{blocks.original}.{n}.{original}"
                    if path not in shapes:
                        continue
                    swap = original in self.swapped and _has_two_chunks(shapes, path, f"{blocks.original}.{n}.context_block.attn.qkv", 3)
                    for other, rows in zip(others, _row_split(shapes, path, len(others)), strict=False):
                        yield Alias(f"{blocks.other}.{n}.{other}", ((path, rows),), swap)
                    if original == "linear1":  # ComfyUI's name of its first three parts
                        if parts := _row_split(shapes, path, 4):
                            yield Alias(f"{path}_qkv", ((path, (0, parts[3][0])),))

    def _of_other(self, shapes: Shapes) -> Iterator[Alias]:
        for original, (other,) in self.top.items():
            if other in shapes:
                yield Alias(original, ((other, None),), original in self.swapped)
        for blocks in self.blocks:
            for n in _numbers(shapes, blocks.other):
                for original, others in blocks.table.items():
                    paths = [f"{blocks.other}.{n}.{other}" for other in others]
                    if any(p not in shapes for p in paths):
                        continue
                    swap = original in self.swapped and _has_two_chunks(shapes, paths[0], f"{blocks.other}.{n}.attn.add_q_proj", 1)
                    yield Alias(f"{blocks.original}.{n}.{original}", tuple((p, None) for p in paths), swap)
                    if original == "linear1":
                        yield Alias(f"{blocks.original}.{n}.linear1_qkv", tuple((p, None) for p in paths[:3]))


def _has_all(shapes: Shapes, patterns: Sequence[str]) -> bool:
    return all(any(map(re.compile(pattern).match, shapes)) for pattern in patterns)


def _numbers(shapes: Shapes, prefix: str) -> list[int]:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return sorted({int(m.group(1)) for m in map(pattern.match, shapes) if m})


def _row_split(shapes: Shapes, path: str, count: int) -> list[tuple[int, int]] | list[None]:
    """(start, length) of each part of a fused matrix; [None] for one part = all rows; [] if the rows do not divide."""
    if count == 1:
        return [None]
    shape = shapes[path]
    rows = shape[0] if shape else 0
    if count < 4:
        sizes = _attention_sizes(shapes, path, rows, count)
    else:  # Flux' linear1: query, key, value, then the wider MLP; linear2 leads back to the model's width
        beside = shapes.get(path.removesuffix("linear1") + "linear2", ())
        width = beside[0] if beside else shape[-1]
        sizes = [width] * 3 + [rows - 3 * width]
    if not sizes or min(sizes) <= 0 or sum(sizes) != rows:
        return []
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _attention_sizes(shapes: Shapes, path: str, rows: int, count: int) -> list[int]:
    # grouped attention (Lumina 2, Z-Image): queries are as wide as the output projection's input, the rest is keys and values
    out = shapes.get(path.removesuffix("qkv") + "out", ()) if path.endswith("attention.qkv") else ()
    if len(out) == 2 and (rows - out[1]) % 2 == 0:
        return [out[1], (rows - out[1]) // 2, (rows - out[1]) // 2]
    return [rows // count] * count if rows % count == 0 else []


def _has_two_chunks(shapes: Shapes, norm: str, attention: str, thirds: int) -> bool:
    """SD3's last block only reads its context, so its context norm has two chunks (shift, scale) instead of six.

    Only those two are stored the other way round by diffusers. The attention beside it has `thirds` times the model's width in rows.
    """
    beside = shapes.get(attention)
    return beside is not None and shapes[norm][0] * thirds == 2 * beside[0]


_TIME_TEXT = "time_text_embed."

FLUX = Layout(
    original_has=(r"(?:double|single)_blocks\.\d+\.(?:img_|txt_|linear1|linear2|modulation)",),
    other_has=(r"single_transformer_blocks\.\d+\.(?:proj_mlp|proj_out|norm\.linear)",),
    blocks=(
        Blocks(
            "double_blocks",
            "transformer_blocks",
            {
                "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "img_attn.proj": ("attn.to_out.0",),
                "txt_attn.proj": ("attn.to_add_out",),
                "img_mod.lin": ("norm1.linear",),
                "txt_mod.lin": ("norm1_context.linear",),
                "img_mlp.0": ("ff.net.0.proj",),
                "img_mlp.2": ("ff.net.2",),
                "txt_mlp.0": ("ff_context.net.0.proj",),
                "txt_mlp.2": ("ff_context.net.2",),
                "img_attn.norm.query_norm.scale": ("attn.norm_q",),
                "img_attn.norm.key_norm.scale": ("attn.norm_k",),
                "txt_attn.norm.query_norm.scale": ("attn.norm_added_q",),
                "txt_attn.norm.key_norm.scale": ("attn.norm_added_k",),
            },
        ),
        Blocks(
            "single_blocks",
            "single_transformer_blocks",
            {
                "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                "linear2": ("proj_out",),
                "modulation.lin": ("norm.linear",),
                "norm.query_norm.scale": ("attn.norm_q",),
                "norm.key_norm.scale": ("attn.norm_k",),
            },
        ),
    ),
    top={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": (_TIME_TEXT + "timestep_embedder.linear_1",),
        "time_in.out_layer": (_TIME_TEXT + "timestep_embedder.linear_2",),
        "vector_in.in_layer": (_TIME_TEXT + "text_embedder.linear_1",),
        "vector_in.out_layer": (_TIME_TEXT + "text_embedder.linear_2",),
        "guidance_in.in_layer": (_TIME_TEXT + "guidance_embedder.linear_1",),
        "guidance_in.out_layer": (_TIME_TEXT + "guidance_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "pos_embed_input": ("controlnet_x_embedder",),
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
)

SD3 = Layout(
    original_has=(r"joint_blocks\.\d+\.",),
    other_has=(r"pos_embed\.proj$", r"transformer_blocks\.\d+\.(?:attn\.add_q_proj|norm1_context\.linear)"),
    blocks=(
        Blocks(
            "joint_blocks",
            "transformer_blocks",
            {
                "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "x_block.attn.proj": ("attn.to_out.0",),
                "x_block.attn2.proj": ("attn2.to_out.0",),
                "context_block.attn.proj": ("attn.to_add_out",),
                "x_block.adaLN_modulation.1": ("norm1.linear",),
                "context_block.adaLN_modulation.1": ("norm1_context.linear",),
                "x_block.mlp.fc1": ("ff.net.0.proj",),
                "x_block.mlp.fc2": ("ff.net.2",),
                "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                "context_block.mlp.fc2": ("ff_context.net.2",),
                "x_block.attn.ln_q": ("attn.norm_q",),
                "x_block.attn.ln_k": ("attn.norm_k",),
                "x_block.attn2.ln_q": ("attn2.norm_q",),
                "x_block.attn2.ln_k": ("attn2.norm_k",),
                "context_block.attn.ln_q": ("attn.norm_added_q",),
                "context_block.attn.ln_k": ("attn.norm_added_k",),
            },
        ),
    ),
    top={
        "x_embedder.proj": ("pos_embed.proj",),
        "pos_embed": ("pos_embed.pos_embed",),
        "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": (_TIME_TEXT + "timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (_TIME_TEXT + "timestep_embedder.linear_2",),
        "y_embedder.mlp.0": (_TIME_TEXT + "text_embedder.linear_1",),
        "y_embedder.mlp.2": (_TIME_TEXT + "text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1", "context_block.adaLN_modulation.1"}),
)

# Of the projections only open_clip's is stored transposed, so `text_projection` has no counterpart here.
CLIP = Layout(
    original_has=(r"transformer\.resblocks\.",),
    other_has=(r"encoder\.layers\.\d+\.(?:self_attn|mlp)\.",),
    blocks=(
        Blocks(
            "transformer.resblocks",
            "encoder.layers",
            {
                "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attn.out_proj": ("self_attn.out_proj",),
                "mlp.c_fc": ("mlp.fc1",),
                "mlp.c_proj": ("mlp.fc2",),
                "ln_1": ("layer_norm1",),
                "ln_2": ("layer_norm2",),
            },
        ),
    ),
    top={
        "token_embedding": ("embeddings.token_embedding",),
        "positional_embedding": ("embeddings.position_embedding",),
        "ln_final": ("final_layer_norm",),
    },
)

LAYOUTS = (FLUX, SD3, CLIP)
