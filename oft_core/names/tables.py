"""Models that are lists of equal blocks, spelled in two ways: the tables, and how a table becomes aliases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]  # dotted module path -> weight shape
Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Alias:
    """`name` in the other layout is these modules (or rows of them), stacked; `swap`: the two halves of the
    rows are exchanged."""

    name: str
    parts: tuple[tuple[str, Rows], ...]
    swap: bool = False


Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Blocks:
    """A list of equal blocks: `original`.N.<key> is `other`.N.<value>; several values are the parts of one
    fused matrix, in row order."""

    original: str
    other: str
    table: Table


@dataclass(frozen=True)
class Layout:
    """Two spellings of one architecture.

    top: modules outside the blocks; further values are further names, used by OMI files.
    original_has, other_has: patterns; a model uses that spelling if each of them matches the start of one
    of its module paths.
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
        for original, others in self.top.items():
            for other in others if original in shapes else ():
                yield Alias(other, ((original, None),), original in self.swapped)
        for blocks in self.blocks:
            for n in _numbers(shapes, blocks.original):
                for original, others in blocks.table.items():
                    path = f"{blocks.original}.{n}.{original}"
                    if path not in shapes:
                        continue
                    beside = f"{blocks.original}.{n}.context_block.attn.qkv"
                    swap = original in self.swapped and _has_two_chunks(shapes, path, beside, 3)
                    split = _row_split(shapes, path, len(others))
                    for i, (other, rows) in enumerate(zip(others, split, strict=False)):
                        yield Alias(f"{blocks.other}.{n}.{other}", ((path, rows),), swap)
                        if rows:  # OMI's name of a part of a fused matrix
                            yield Alias(f"{path}.{i}", ((path, rows),))
                    if original == "linear1" and split and split[3]:  # ComfyUI's name of the first three
                        yield Alias(f"{path}_qkv", ((path, (0, split[3][0])),))

    def _of_other(self, shapes: Shapes) -> Iterator[Alias]:
        for original, (other, *further) in self.top.items():
            for name in (original, *further) if other in shapes else ():
                yield Alias(name, ((other, None),), original in self.swapped)
        for blocks in self.blocks:
            for n in _numbers(shapes, blocks.other):
                for original, others in blocks.table.items():
                    path = f"{blocks.original}.{n}.{original}"
                    parts = [(f"{blocks.other}.{n}.{other}", None) for other in others]
                    for i, part in enumerate(parts):
                        if len(parts) > 1 and part[0] in shapes:
                            yield Alias(f"{path}.{i}", (part,))
                    if any(part not in shapes for part, _ in parts):
                        continue
                    beside = f"{blocks.other}.{n}.attn.add_q_proj"
                    swap = original in self.swapped and _has_two_chunks(shapes, parts[0][0], beside, 1)
                    yield Alias(path, tuple(parts), swap)
                    if original == "linear1":
                        yield Alias(f"{path}_qkv", tuple(parts[:3]))


def _has_all(shapes: Shapes, patterns: Sequence[str]) -> bool:
    return all(any(map(re.compile(pattern).match, shapes)) for pattern in patterns)


def _numbers(shapes: Shapes, prefix: str) -> list[int]:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return sorted({int(m.group(1)) for m in map(pattern.match, shapes) if m})


def _row_split(shapes: Shapes, path: str, count: int) -> list[Rows]:
    """(start, length) of each part of a fused matrix; [None] = one part, all rows; [] = none fit."""
    if count == 1:
        return [None]
    shape = shapes[path]
    if len(shape) == 0:
        return []
    rows = shape[0]
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
    # grouped attention (Lumina 2, Z-Image): queries are as wide as the output projection's input, the rest
    # is keys and values
    out = shapes.get(path.removesuffix("qkv") + "out", ()) if path.endswith("attention.qkv") else ()
    if len(out) == 2 and (rows - out[1]) % 2 == 0:
        return [out[1], (rows - out[1]) // 2, (rows - out[1]) // 2]
    return [rows // count] * count if rows % count == 0 else []


def _has_two_chunks(shapes: Shapes, norm: str, attention: str, thirds: int) -> bool:
    """True for the context norm of SD3's last block, which only reads its context: two chunks, not six.

    Only those two (shift, scale) are stored the other way round by diffusers. The attention beside it has
    `thirds` times the model's width in rows.
    """
    rows, beside = shapes[norm][:1], shapes.get(attention, ())[:1]
    return len(rows) == len(beside) == 1 and rows[0] * thirds == 2 * beside[0]


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
        "img_in": ("x_embedder", "img_in.proj"),
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

AURAFLOW = Layout(
    original_has=(r"(?:double|single)_layers\.\d+\.attn\.w1q",),
    other_has=(r"(?:joint|single)_transformer_blocks\.\d+\.ff\.out_projection",),
    blocks=(
        Blocks(
            "double_layers",
            "joint_transformer_blocks",
            {
                "attn.w2q": ("attn.to_q",),
                "attn.w2k": ("attn.to_k",),
                "attn.w2v": ("attn.to_v",),
                "attn.w2o": ("attn.to_out.0",),
                "attn.w1q": ("attn.add_q_proj",),
                "attn.w1k": ("attn.add_k_proj",),
                "attn.w1v": ("attn.add_v_proj",),
                "attn.w1o": ("attn.to_add_out",),
                "mlpX.c_fc1": ("ff.linear_1",),
                "mlpX.c_fc2": ("ff.linear_2",),
                "mlpX.c_proj": ("ff.out_projection",),
                "mlpC.c_fc1": ("ff_context.linear_1",),
                "mlpC.c_fc2": ("ff_context.linear_2",),
                "mlpC.c_proj": ("ff_context.out_projection",),
                "modX.1": ("norm1.linear",),
                "modC.1": ("norm1_context.linear",),
            },
        ),
        Blocks(
            "single_layers",
            "single_transformer_blocks",
            {
                "attn.w1q": ("attn.to_q",),
                "attn.w1k": ("attn.to_k",),
                "attn.w1v": ("attn.to_v",),
                "attn.w1o": ("attn.to_out.0",),
                "modCX.1": ("norm1.linear",),
                "mlp.c_fc1": ("ff.linear_1",),
                "mlp.c_fc2": ("ff.linear_2",),
                "mlp.c_proj": ("ff.out_projection",),
            },
        ),
    ),
    top={
        "positional_encoding": ("pos_embed.pos_embed",),
        "t_embedder.mlp.0": ("time_step_proj.linear_1",),
        "t_embedder.mlp.2": ("time_step_proj.linear_2",),
        "cond_seq_linear": ("context_embedder",),
        "init_x_linear": ("pos_embed.proj",),
        "final_linear": ("proj_out",),
        "modF.1": ("norm_out.linear",),
    },
    swapped=frozenset({"modF.1"}),
)

_ADALN = "adaln_single.emb."

PIXART = Layout(
    original_has=(r"blocks\.\d+\.cross_attn\.kv_linear$",),
    other_has=(r"pos_embed\.proj$", r"caption_projection\.", r"transformer_blocks\.\d+\.attn1\."),
    blocks=(
        Blocks(
            "blocks",
            "transformer_blocks",
            {
                "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
                "attn.proj": ("attn1.to_out.0",),
                "cross_attn.q_linear": ("attn2.to_q",),
                "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
                "cross_attn.proj": ("attn2.to_out.0",),
                "mlp.fc1": ("ff.net.0.proj",),
                "mlp.fc2": ("ff.net.2",),
            },
        ),
    ),
    top={
        "x_embedder.proj": ("pos_embed.proj",),
        "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
        "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
        "y_embedder.y_embedding": ("caption_projection.y_embedding",),
        "t_embedder.mlp.0": (_ADALN + "timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (_ADALN + "timestep_embedder.linear_2",),
        "csize_embedder.mlp.0": (_ADALN + "resolution_embedder.linear_1",),
        "csize_embedder.mlp.2": (_ADALN + "resolution_embedder.linear_2",),
        "ar_embedder.mlp.0": (_ADALN + "aspect_ratio_embedder.linear_1",),
        "ar_embedder.mlp.2": (_ADALN + "aspect_ratio_embedder.linear_2",),
        "t_block.1": ("adaln_single.linear",),
        "final_layer.linear": ("proj_out",),
        "final_layer.scale_shift_table": ("scale_shift_table",),
    },
)

_Z_BLOCK = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
}

Z_IMAGE = Layout(
    original_has=(r"(?:noise_refiner|layers)\.\d+\.attention\.qkv$",),
    other_has=(r"(?:noise_refiner|layers)\.\d+\.attention\.to_q$",),
    blocks=tuple(Blocks(name, name, _Z_BLOCK) for name in ("layers", "noise_refiner", "context_refiner")),
    top={
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        "x_embedder": ("all_x_embedder.2-1",),
    },
)

LAYOUTS = (FLUX, SD3, AURAFLOW, PIXART, Z_IMAGE, CLIP)
