"""The node that gathers training pictures: OFT Dataset."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw

from ..oft_core.training import ConfigError
from ..oft_core.training.dataset import TrainingSet, from_pillow, to_pillow
from ..oft_core.training.dataset import build as gather
from ..oft_core.training.filenames import inside
from ..oft_core.training.folder import scan
from ..oft_core.training.pictures import Picture
from . import compat

CATEGORY = "OFT"
NO_FOLDER = "(none)"
# What a mask is that came over a link, and what to do if nothing of a picture is left.
CONNECTED = (
    "the mask is black",
    "Load Image gives white where a picture is transparent: invert that mask, or leave it unconnected.",
)
OFTDataset = io.Custom("OFT_DATASET")

TIPS = {
    "pictures": (
        "The pictures to learn from: one IMAGE batch, or a list of pictures of any sizes. Leave it unconnected "
        "to use a folder."
    ),
    "masks": (
        "Where to learn: white counts, black does not. One mask for every picture, in their order. Load Image "
        "gives white where a picture is transparent: invert that mask, or leave it unconnected. In folders, "
        "1-masklabel.png is the mask of 1.png; without such a file, transparent parts of a picture do not count."
    ),
    "folder": (
        "A folder inside ComfyUI's input folder. A text file of the same name beside a picture is its caption "
        "(cat.txt, cat.caption or cat.png.txt for cat.png). Without pictures of its own, its subfolders such as "
        "'10_zwx dog' are read: 10 times each, with 'zwx dog' as caption. The summary names files that are not "
        "used. Press R after adding a folder."
    ),
    "captions": (
        "One caption a line, in the order of the pictures (folders: sorted by name). It goes before text files in a "
        "folder. Pictures without a line or with an empty one take their text file, else the instance prompt."
    ),
    "instance_prompt": (
        "The caption of every picture that has none of its own. [trigger] stands for the trigger word."
    ),
    "trigger": (
        "A rare word for the subject, such as 'ohwx'. It is put in front of captions that do not have it. Empty: "
        "nothing is put in front, and [trigger] is taken out."
    ),
    "class_prompt": (
        "What the subject is in general, such as 'a photo of a dog'. Used to keep the model's idea of that class "
        "(prior preservation). Empty: none."
    ),
    "resolution": "Side of a square picture in pixels; other shapes get about the same area.",
    "buckets": (
        "On: every picture keeps nearly its own shape, and is fitted to the nearest of several sizes. Off: all "
        "are cut to squares."
    ),
    "bucket_step": "Widths and heights are multiples of this many pixels. 64 suits every model.",
    "repeats": "How often each picture is seen in one pass through the set.",
    "flips": "Also show every picture mirrored. Not for faces, text and other things with a left and a right.",
    "out_dataset": "The pictures with their captions and sizes, for Train OFT.",
    "out_summary": "Numbers of pictures and sizes, captions, and remarks.",
    "out_sheet": "All pictures as they are cut, with size, mask and caption.",
}


# --- pictures -----------------------------------------------------------------------------------------------


def folder_choices() -> list[str]:
    """Folders inside `input`, at most three deep, by their path with forward slashes."""
    root = Path(folder_paths.get_input_directory())
    found = []
    for here, below, _ in os.walk(root):
        inside = Path(here).relative_to(root)
        below[:] = sorted(d for d in below if not d.startswith(".")) if len(inside.parts) < 3 else []
        if inside.parts:
            found.append(inside.as_posix())
    return [NO_FOLDER, *found]


def folder_path(name: str) -> Path:
    """The folder called `name` inside `input`. Raises ConfigError if it leads elsewhere or does not exist."""
    root = os.path.abspath(folder_paths.get_input_directory())
    path = os.path.abspath(os.path.join(root, name))
    if os.path.isabs(name) or inside(path, root) is None:
        raise ConfigError(
            "The folder must lie inside ComfyUI's input folder", found=name, hint="Copy the pictures there."
        )
    if not os.path.isdir(path):
        raise ConfigError(
            "There is no such folder inside ComfyUI's input folder", found=name, hint="Press R on the page."
        )
    return Path(path)


def _finite(values: torch.Tensor, name: str) -> torch.Tensor:
    """The values as float32 on the CPU. Raises ConfigError for NaN and infinity, which would become black or white."""
    values = values.detach().cpu().float()
    if not values.isfinite().all():
        raise ConfigError(
            "Numbers that are not finite came over a link",
            file=name,
            found=f"{int((~values.isfinite()).sum())} of {values.numel()}",
            expected="numbers from 0 to 1",
            hint="Look at the node that made it; a VAE in half precision can give such pictures.",
        )
    return values


def _from_link(batches: list[torch.Tensor]) -> list[Picture]:
    """The pictures of IMAGE batches (n, h, w, 3 or 4), each with its transparency as mask."""
    out = []
    for image in (one for batch in batches for one in batch):
        name = f"picture {len(out) + 1}"
        array = (_finite(image, name).clamp(0, 1) * 255).round().byte().numpy()
        alpha = Image.fromarray(np.ascontiguousarray(array[..., 3])) if array.shape[-1] == 4 else None
        if alpha is not None and alpha.getextrema()[0] == 255:
            alpha = None
        out.append(Picture(name, name, Image.fromarray(np.ascontiguousarray(array[..., :3])), alpha))
    return out


def _mask_pictures(masks: list[torch.Tensor]) -> list[Any]:
    """Pillow "L" pictures of MASK batches (n, h, w) or single masks (h, w)."""
    flat = [one for m in masks for one in (m if m.ndim == 3 else m.unsqueeze(0))]
    return [
        Image.fromarray((_finite(one, f"mask {i + 1}").clamp(0, 1) * 255).round().byte().numpy())
        for i, one in enumerate(flat)
    ]


def build(
    *,
    pictures: list[torch.Tensor] | None = None,
    masks: list[torch.Tensor] | None = None,
    folder: str = NO_FOLDER,
    **options: Any,
) -> TrainingSet:
    """`training.dataset.build` with ComfyUI's pictures, masks and folders.

    pictures: IMAGE batches.   masks: MASK batches.   folder: its name inside `input`.   Raises ConfigError (both
    sources or none, numbers that are not finite, a folder elsewhere) and what that raises.
    """
    linked = pictures is not None
    has_folder = folder not in ("", NO_FOLDER)
    if linked == has_folder:
        raise ConfigError(
            "Connect pictures, or choose a folder" + (", not both" if linked else ""),
            found="both" if linked else "neither",
        )
    return gather(
        pictures=_from_link(pictures) if linked else None,
        folder=folder_path(folder) if has_folder else None,
        masks=None if masks is None else _mask_pictures(masks),
        mask_is=CONNECTED,
        masks_are="connected",
        **options,
    )


def summary(of: TrainingSet) -> str:
    """A few lines for people."""
    whole = [r for r in of.records if not r.flip]
    mirrored = len(of.records) - len(whole)
    masks = sum(r.has_mask for r in whole)
    lines = [
        f"{len(whole)} pictures"
        + (", also mirrored" if mirrored else "")
        + (f", {masks} with a mask" if masks else "")
        + f"; {sum(r.repeats for r in of.records)} steps of one picture are one pass."
    ]
    for bucket, count in sorted(Counter(r.bucket for r in whole).items()):
        lines.append(f"{bucket[0]} x {bucket[1]}: {count}")
    texts = Counter(r.caption for r in whole)
    lines.append(f"{len(texts)} different captions; the first: {whole[0].caption!r}")
    if of.trigger:
        lines.append(f"Trigger: {of.trigger}")
    if of.class_prompt:
        lines.append(f"Class: {of.class_prompt}")
    return "\n".join([*lines, *of.notes])


TILE, TEXT_ROWS, COLUMNS = 192, 3, 6


def contact_sheet(of: TrainingSet, most: int = 60) -> torch.Tensor:
    """IMAGE (1, h, w, 3): the pictures as they are cut, masked parts dimmed, with size and caption."""
    shown = [r for r in of.records if not r.flip][:most]
    columns = min(COLUMNS, len(shown))
    cell = TILE + 14 * TEXT_ROWS + 8
    sheet = Image.new("RGB", (columns * TILE, -(-len(shown) // columns) * cell), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for i, record in enumerate(shown):
        image, mask = of.load(record)
        if mask is not None:
            image = image * (0.25 + 0.75 * mask)
        picture = to_pillow(image)
        picture.thumbnail((TILE - 4, TILE - 4))
        left, top = i % columns * TILE, i // columns * cell
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        size = f"{record.bucket[0]}x{record.bucket[1]}" + (" mask" if mask is not None else "")
        for row, text in enumerate([size, record.caption[:30], record.caption[30:60]]):
            pen.text((left + 4, top + TILE + 14 * row), text, fill=(220, 220, 220))
    return from_pillow(sheet)


# --- the node -----------------------------------------------------------------------------------------------


def _first(value: Any, otherwise: Any = None) -> Any:
    """Inputs of this node come as lists."""
    if isinstance(value, (list, tuple)):
        return value[0] if value else otherwise
    return otherwise if value is None else value


class OFTDatasetNode(io.ComfyNode):
    """OFT Dataset: pictures, captions, sizes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        entry = compat.explained(TIPS)
        return compat.schema(
            node_id="OFT_Dataset",
            display_name="OFT Dataset",
            category=CATEGORY,
            description="Gathers pictures and captions for Train OFT, and shows what will be trained on.",
            search_aliases=["oft", "dreambooth", "training pictures", "captions"],
            is_input_list=True,
            inputs=[
                entry(io.Image.Input, "pictures", optional=True),
                entry(io.Mask.Input, "masks", optional=True),
                entry(io.Combo.Input, "folder", options=folder_choices(), default=NO_FOLDER),
                entry(io.String.Input, "captions", default="", multiline=True),
                entry(io.String.Input, "instance_prompt", default="a photo of [trigger]"),
                entry(io.String.Input, "trigger", default=""),
                entry(io.String.Input, "class_prompt", default=""),
                entry(io.Int.Input, "resolution", default=512, min=64, max=4096, step=64),
                entry(io.Boolean.Input, "buckets", default=True, optional=True, advanced=True),
                entry(
                    io.Int.Input,
                    "bucket_step",
                    default=64,
                    min=16,
                    max=256,
                    step=16,
                    optional=True,
                    advanced=True,
                ),
                entry(io.Int.Input, "repeats", default=1, min=1, max=1000, optional=True, advanced=True),
                entry(io.Boolean.Input, "flips", default=False, optional=True, advanced=True),
            ],
            outputs=[
                OFTDataset.Output(display_name="dataset", tooltip=TIPS["out_dataset"]),
                io.String.Output(display_name="summary", tooltip=TIPS["out_summary"]),
                io.Image.Output(display_name="contact_sheet", tooltip=TIPS["out_sheet"]),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: Any = None) -> bool | str:
        name = _first(folder)
        if name in (None, "", NO_FOLDER):
            return True
        try:
            folder_path(name)
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: Any = None, **_: Any) -> str:
        name = _first(folder)
        if name in (None, "", NO_FOLDER):
            return ""
        try:
            found = scan(folder_path(name))
            files = [[str(p), (s := p.stat()).st_mtime_ns, s.st_size] for p in found.read]
        except (ConfigError, OSError):
            return "missing"
        return json.dumps([files, [p.name for p in found.subfolders]])

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        texts = inputs.get("captions") or [""]
        # Over a link every text is one caption; in the box every line is.
        captions = texts[0].splitlines() if len(texts) == 1 else [" ".join(t.split()) for t in texts]
        plain = {
            k: _first(v)
            for k, v in inputs.items()
            if k not in ("pictures", "masks", "captions") and _first(v) is not None
        }
        made = build(
            pictures=inputs.get("pictures") or None,
            masks=inputs.get("masks") or None,
            captions=captions,
            **plain,
        )
        text = summary(made)
        return io.NodeOutput(made, text, contact_sheet(made), ui=ui.PreviewText(text))


NODES = (OFTDatasetNode,)
