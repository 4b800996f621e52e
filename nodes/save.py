"""Save OFT: an adapter as a file of a chosen tool."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui
from safetensors import safe_open
from safetensors.torch import save_file

from ..oft_core import Adapter, Strength
from ..oft_core.atomic import all_or_none
from ..oft_core.convert import about_fits, about_lora, convert, convert_near, to_lora
from ..oft_core.errors import FileError, FormatError
from ..oft_core.formats.peft import PEFT_TYPES
from ..oft_core.formats.write import WRITERS
from ..oft_core.listed import CONFIG
from ..oft_core.tensors import normal_tensors
from ..oft_core.training import ConfigError
from ..oft_core.training.filenames import RUN
from . import compat
from .binding import folders, names
from .binding.files import listed, new_file
from .inputs import CATEGORY, OFTAdapter

AS_IS = "as it is"
LORA = "lora"
# Formats whose files do not say themselves how the rotations are built and limited.
PEFT_DIALECTS = ("F6", "F7", "F8", "F9", "F10", "F16", "F17", "F18")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TIPS = {
    "adapter": "The adapter to write.",
    "model": "The model that the adapter is for. Needed for any dialect but 'as it is'.",
    "clip": "Its text encoders, if the adapter has layers for them.",
    "dialect": (
        "Whose format to write. oft_v2: OneTrainer. oft_v2_plus: the same with trained biases and whole layers, "
        "for this pack. peft: a folder with its config. lycoris: Diag-OFT. kohya, comfy: those tools' own. A "
        "dialect that cannot hold the adapter is refused with the reason. lora: of low rank, for tools without OFT."
    ),
    "precision": "Of the numbers in the file. fp16 halves its size and is precise enough for pictures.",
    "folder": "oft: models/oft, where Load OFT finds it at once. output: ComfyUI's output folder.",
    "strength": "Baked in, with the strengths of OFT Block Strengths. 1: the adapter as it is.",
    "approximate": (
        "Where the dialect cannot hold the adapter: write the nearest rotations on this model, and say how much is left out."
    ),
    "rank": "Of a LoRA. A rotation has no low rank: the message says how much of the change is left out.",
    "out_name": "The file as Load OFT lists it.",
    "name": "Name of the file; may contain a subfolder. A number is added.",
}


class OFTSave(io.ComfyNode):
    """Save OFT: an adapter as a file of a chosen tool."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        entry = compat.explained(TIPS)
        return compat.schema(
            node_id="OFT_Save",
            display_name="Save OFT",
            category=CATEGORY,
            description="Writes an OFT adapter to a file that a chosen tool reads.",
            search_aliases=["oft", "save", "convert", "export"],
            is_output_node=True,
            inputs=[
                OFTAdapter.Input("adapter", tooltip=TIPS["adapter"]),
                entry(io.Model.Input, "model", optional=True),
                entry(io.Clip.Input, "clip", optional=True),
                entry(io.String.Input, "name", default="oft"),
                entry(io.Combo.Input, "dialect", options=[AS_IS, *WRITERS, LORA], default=AS_IS),
                entry(io.Combo.Input, "precision", options=list(PRECISIONS), default="fp32"),
                entry(io.Combo.Input, "folder", options=["oft", "output"], default="oft"),
                entry(io.Float.Input, "strength", default=1.0, min=-10.0, max=10.0, step=0.05, optional=True),
                entry(io.Boolean.Input, "approximate", default=False, optional=True),
                entry(io.Int.Input, "rank", default=32, min=1, max=4096, optional=True),
            ],
            outputs=[io.String.Output(display_name="file_name", tooltip=TIPS["out_name"])],
        )

    @classmethod
    def execute(
        cls, adapter: Adapter, name, dialect, precision, folder, model=None, clip=None, strength=1.0, approximate=False, rank=32,
    ) -> io.NodeOutput:
        if adapter.schedule is not None:
            raise ConfigError(
                "A file has no place for a schedule",
                found=str(adapter.schedule),
                hint="Connect the adapter as it is before OFT Schedule.",
            )
        if dialect == AS_IS and (adapter.blocks is not None or strength != 1):
            raise ConfigError(
                "The adapter's own file has no place for strengths",
                found=str(adapter.blocks or strength),
                hint="Choose a dialect: they are baked in there.",
            )
        root = folder_paths.get_folder_paths(folders.FOLDER)[0]
        path = new_file(name, folder_paths.get_output_directory() if folder == "output" else root)
        said = ""
        with normal_tensors():
            if dialect == AS_IS:
                written = _copy(adapter, path, PRECISIONS[precision])
            else:
                at = Strength(strength)
                written, said = _convert(adapter, model, clip, path, dialect, PRECISIONS[precision], at, approximate, rank)
        shown = (
            listed(written)
            if folder == "oft"
            else os.path.relpath(written, folder_paths.get_output_directory())
        )
        return io.NodeOutput(shown, ui=ui.PreviewText("\n".join(filter(None, (f"Saved: {shown}", said)))))


def _copy(adapter: Adapter, path: Path, dtype: torch.dtype) -> Path:
    """The adapter's own file again, numbers in another precision; a folder if PEFT's config belongs to it."""
    if not os.path.isfile(adapter.path) or not folders.reads(adapter.path):
        raise FormatError(
            "The file that this adapter was read from is not there any more",
            file=adapter.path,
            hint="Choose a dialect and connect the model.",
        )
    with safe_open(adapter.path, "pt") as f:
        metadata = _carried(f.metadata() or {})
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    tensors = {
        k: (t.to(dtype) if t.is_floating_point() and t.numel() > 1 else t).contiguous()
        for k, t in tensors.items()
    }
    config = _peft_config(adapter)
    files = {}
    if config is not None:
        path = path.with_suffix("") / "adapter_model.safetensors"
        files[path.parent / CONFIG] = lambda part: Path(part).write_bytes(config)
    files[path] = lambda part: save_file(tensors, part, metadata or None)
    all_or_none(files)
    return path


def _peft_config(adapter: Adapter) -> bytes | None:
    """PEFT's config beside the adapter's file, which says how to build the rotations; None if it is not for this file.

    Raises FileError if it cannot be read.
    """
    config = Path(adapter.path).parent / CONFIG
    if adapter.dialect not in PEFT_DIALECTS or not config.is_file():
        return None
    raw = config.read_bytes()
    try:
        content = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise FileError(
            "PEFT's config beside the file cannot be read", file=config, found=str(error)
        ) from error
    return raw if isinstance(content, dict) and content.get("peft_type") in PEFT_TYPES else None


def _convert(
    adapter: Adapter, model: Any, clip: Any, path: Path, dialect: str, dtype: torch.dtype, strength: Strength, approximate: bool, rank: int,
) -> tuple[Path, str]:
    """The file, and how much of the adapter it leaves out, in words; "" if nothing."""
    if model is None and clip is None:
        raise ConfigError(
            "Writing another dialect needs the model that the adapter is for",
            found="no model",
            hint="Connect MODEL (and CLIP), or choose 'as it is'.",
        )
    own, index = names.own_weights(model, clip), names.index_of(model, clip)
    more = {"base": own, "metadata": _carried(adapter.metadata), "dtype": dtype, "strength": strength}
    if dialect == LORA:
        written, layers = to_lora(adapter, index, path, rank=rank, **more)
        return written, f"A LoRA for this model only. {about_lora(layers)}"
    if approximate:
        written, fits = convert_near(adapter, index, path, dialect, **more)
        return written, about_fits(fits) if fits else ""
    return convert(adapter, index, path, dialect, **more), ""


def _carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata for a copy, which is not the training's own file: that run must not write over it."""
    return {k: v for k, v in metadata.items() if k != RUN}


NODES = (OFTSave,)
