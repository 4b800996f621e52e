"""The same weights under other names: U-Nets here, models made of equal blocks by tables.

Everything here is derived from which modules a model has, never from sizes of known models: blocks are
numbered by walking them, and the rows of a fused matrix come from the shapes. Names that the structure does
not settle (a gap in the numbering, a fused matrix with a part missing) are left out, so they stay "not
found" and never point to a wrong module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from . import picture_tables, video_tables
from .layout import Alias, Shapes, kinds


def other_names(shapes: Shapes) -> Iterator[Alias]:
    """Every name that the modules of one part (diffusion model or text encoder) have in other layouts."""
    yield from _unet_names(shapes)
    known, paths = False, kinds(shapes)
    for layout in (*video_tables.LAYOUTS, *picture_tables.LAYOUTS):
        found = layout.names(shapes, paths)
        # A second layout that fits has names of which only files know.
        yield from (replace(alias, further=True) for alias in found) if known else found
        known = known or bool(found)


# ----------------------------------------------------------------------------------------------------
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
        contents, authors = _contents(shapes, _LDM_BLOCK), False
        blocks = dict(_walk_ldm(contents))
        top, resnet = [(ldm, other) for ldm, other in _UNET_TOP], _RESNET
    elif any(p.startswith(("down_blocks.", "up_blocks.")) for p in shapes):
        contents, authors = _contents(shapes, _DIFFUSERS_BLOCK), True
        blocks = {diffusers: ldm for ldm, diffusers in _walk_diffusers(contents)}
        top, resnet = [(other, ldm) for ldm, other in _UNET_TOP], {v: k for k, v in _RESNET.items()}
    else:
        return
    for here, there in top:
        if here in shapes:
            yield Alias(there, ((here, None),), authors=authors)
    for block, inside in contents.items():
        if block not in blocks:
            continue
        for path in inside:
            if path in ("op", "conv"):  # a down- or upsampler: one convolution, called `op` on ldm's way down
                there = blocks[block] + (".op" if "input_blocks" in blocks[block] else ".conv")
            else:
                there = f"{blocks[block]}.{_inside(path, inside, resnet)}"
            yield Alias(there, ((f"{block}.{path}", None),), authors=authors)
            if f".{_SPATIAL}" in there:  # ComfyUI's name, as in models without time
                yield Alias(there.replace(_SPATIAL, ""), ((f"{block}.{path}", None),), further=True)


#: A video model's blocks are for single pictures and along time: ldm's names of the latter, diffusers'.
_ALONG_TIME = (
    ("time_stack.", "temporal_transformer_blocks."),
    ("time_pos_embed.0", "time_pos_embed.linear_1"),
    ("time_pos_embed.2", "time_pos_embed.linear_2"),
)
_SPATIAL, _TEMPORAL = "spatial_res_block.", "temporal_res_block."


def _inside(path: str, inside: set[str], resnet: Mapping[str, str]) -> str:
    """A module path inside a block of a U-Net, in the other spelling; `resnet`: the names inside a residual block there."""
    if path.startswith(_SPATIAL):
        return resnet.get(path.removeprefix(_SPATIAL), path)
    if path.startswith(_TEMPORAL):
        return "time_stack." + resnet.get(path.removeprefix(_TEMPORAL), path)
    if "time_stack.in_layers.0" in inside:
        inner = path.removeprefix("time_stack.")
        return f"{_SPATIAL if inner == path else _TEMPORAL}{resnet[inner]}" if inner in resnet else path
    if path.startswith(("time_", "temporal_")):
        for ldm, diffusers in _ALONG_TIME:
            for here, there in ((ldm, diffusers), (diffusers, ldm)):
                if path.startswith(here):
                    return there + path.removeprefix(here)
    return resnet.get(path, path)


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
    """(ldm block, diffusers block): ldm counts straight through, diffusers starts a new block after every
    change of size."""
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
    """(ldm block, diffusers block), walking the diffusers names. Stops where the next ldm number cannot be
    known."""

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
