"""The tab "OFT": what a file is, what the last picture's tags did, training, a file baked into a checkpoint or written for another tool.

Only features that gradio 3.41 and 4.40 share.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from modules import call_queue, sd_models, shared

from ..oft_core import (
    COFT_CHOICES,
    MODES,
    AdapterError,
    BlockWeights,
    FileError,
    Strength,
    describe,
    merge_file,
)
from ..oft_core.convert import FOLDER, convert
from ..oft_core.errors import printable
from ..oft_core.formats.write import WRITERS
from ..oft_core.merge import DTYPES
from ..oft_core.model_file import open_model
from ..oft_core.pictures import adapter_picture
from . import activation, files
from .training import ui

NO_FILES = "There are no OFT files yet. Put them into models/OFT, then press Refresh."
NO_PICTURE = "No picture has been drawn since the web UI was started, or the last one had no OFT tags."
_KEEP = "keep"


def build() -> list[tuple[gr.Blocks, str, str]]:
    """The tab, for ``on_ui_tabs``: (contents, title, id)."""
    with gr.Blocks(analytics_enabled=False) as tab, gr.Tabs():
        for title, part in (
            ("Inspect", _inspect), ("Last picture", _last), ("Train", _train), ("Merge", _merge), ("Convert", _convert)
        ):
            with gr.TabItem(title, elem_id=f"oft_{part.__name__.strip('_')}_tab"):
                part()
    return [(tab, "OFT", "oft_tab")]


# --- parts --------------------------------------------------------------------------------------------------


def _inspect() -> None:
    file = _choice("oft_inspect", "File", _names)
    go = gr.Button("Inspect", variant="primary", elem_id="oft_inspect_go")
    text = gr.Textbox(label="Report", lines=20, max_lines=60, interactive=False, elem_id="oft_inspect_report")
    with gr.Accordion("As JSON", open=False):
        data = gr.Code(label="JSON", language="json", interactive=False, elem_id="oft_inspect_json")
    picture = gr.Image(label="Angles by layer and block", interactive=False, elem_id="oft_inspect_picture")
    go.click(fn=inspect, inputs=[file], outputs=[text, data, picture])


def _last() -> None:
    go = gr.Button("Refresh", elem_id="oft_last_go")
    text = gr.Textbox(label="What the tags of the last picture did", lines=20, max_lines=60, interactive=False, elem_id="oft_last_report")
    go.click(fn=last_picture, inputs=[], outputs=[text])


def _train() -> None:
    ui.build()


def _merge() -> None:
    gr.Markdown("Bakes a file into a checkpoint: the same pictures as with a tag, in every program that reads checkpoints.")
    task = gr.Textbox(visible=False)
    with gr.Row():
        file = _choice("oft_merge_file", "File", _names)
        base = _choice("oft_merge_base", "Checkpoint", _checkpoints)
    with gr.Row():
        strength = gr.Slider(label="Strength", minimum=-2.0, maximum=2.0, step=0.01, value=1.0, elem_id="oft_merge_strength")
        mode = gr.Dropdown(label="Mode", choices=list(MODES), value=MODES[0], elem_id="oft_merge_mode")
        coft = gr.Textbox(label=f"COFT limit: {', '.join(COFT_CHOICES)} or degrees", value="file", elem_id="oft_merge_coft")
        blocks = gr.Textbox(label="Strength by block", placeholder="all=0, output.3-5=1", elem_id="oft_merge_blocks")
    with gr.Row():
        name = gr.Textbox(label="Name of the new checkpoint", placeholder="as file and checkpoint", elem_id="oft_merge_name")
        dtype = gr.Dropdown(label="Numbers", choices=[_KEEP, *DTYPES], value=_KEEP, elem_id="oft_merge_dtype")
    go = gr.Button("Merge", variant="primary", elem_id="oft_merge_go")
    with gr.Column(elem_id="oft_merge_results"):
        progress = gr.HTML(elem_id="oft_merge_progress")
        text = gr.Textbox(label="Result", lines=4, interactive=False, elem_id="oft_merge_result")
    go.click(
        fn=call_queue.wrap_gradio_gpu_call(merge, extra_outputs=[""]),
        inputs=[task, file, base, strength, mode, coft, blocks, name, dtype], outputs=[text, progress],
        **_javascript("oft_merge"),
    )


def _convert() -> None:
    gr.Markdown("Writes a file in another tool's form. It holds exactly the same rotations, or it is refused with the reason.")
    with gr.Row():
        file = _choice("oft_convert_file", "File", _names)
        base = _choice("oft_convert_base", "A checkpoint that the file is for (its layers' names and sizes are read)", _checkpoints)
    with gr.Row():
        titles = [(writer.title, name) for name, writer in WRITERS.items()]
        dialect = gr.Dropdown(label="For", choices=[title for title, _ in titles], value=titles[0][0], elem_id="oft_convert_dialect")
        name = gr.Textbox(label="Name of the new file, in models/OFT", placeholder="as the file", elem_id="oft_convert_name")
    go = gr.Button("Convert", variant="primary", elem_id="oft_convert_go")
    text = gr.Textbox(label="Result", lines=4, interactive=False, elem_id="oft_convert_result")
    go.click(fn=convert_file, inputs=[file, base, dialect, name], outputs=[text])


def _choice(name: str, label: str, choices: Callable[[], list[str]]) -> gr.Dropdown:
    """A dropdown with a button that looks again."""
    with gr.Row():
        found = choices()
        box = gr.Dropdown(label=label, choices=found, value=found[0] if found else None, elem_id=name)
        again = gr.Button("Refresh", elem_id=f"{name}_refresh", scale=0, min_width=110)
    again.click(fn=functools.partial(_looked, choices), inputs=[], outputs=[box])
    return box


def _looked(choices: Callable[[], list[str]]) -> Any:
    files.refresh()
    return gr.update(choices=choices())


def _names() -> list[str]:
    return [file.name for file in files.all_files()]


def _checkpoints() -> list[str]:
    return [title for title, info in sd_models.checkpoints_list.items() if info.filename.endswith(".safetensors")]


def _javascript(name: str) -> dict[str, str]:
    """A script function that runs before a call, under the name that this gradio gives it."""
    return {("_js" if gr.__version__.startswith("3.") else "js"): name}


# --- what the buttons do ------------------------------------------------------------------------------------


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with errors that a person can act on as its (first) answer."""

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        try:
            return function(*args)
        except AdapterError as error:
            return str(error)
        except OSError as error:
            return f"{error.strerror or error}; file: {printable(error.filename or '', 1000)}"

    return wrapped


def inspect(name: str | None) -> tuple[str, str, Any]:
    """(report, the same as JSON, picture of the angles) of a listed file."""
    try:
        adapter = files.read(_file(name))
        report = describe(adapter)
        return report.to_text(), report.to_json(), adapter_picture(adapter)
    except AdapterError as error:
        return str(error), "", None


def last_picture() -> str:
    """What the last picture's tags did."""
    return "\n\n".join(f"{report.tag}\n{report.text}" for report in activation.last) or NO_PICTURE


def merge(
    task: str, name: str, base: str, strength: float, mode: str, coft: str, blocks: str, target: str, dtype: str
) -> tuple[str, str]:
    """Merge a file into a checkpoint -> (what was done, nothing). task: the host's number of this call."""
    return _merged(name, base, strength, mode, coft, blocks, target, dtype), ""


@_told
def _merged(name: str, base: str, strength: float, mode: str, coft: str, blocks: str, target: str, dtype: str) -> str:
    file, info = _file(name), _checkpoint(base)
    adapter = files.read(file)
    if blocks.strip():
        adapter = replace(adapter, blocks=BlockWeights.parse(blocks))
    at = Strength(float(strength), mode, coft.strip() or "file")
    folder = Path(info.filename).parent
    out = _new(folder, target or f"{Path(info.filename).stem}_{Path(file.name).name}", ".safetensors")
    shared.state.job_count = 1
    shared.state.textinfo = f"Merging {file.name} into {Path(info.filename).stem}"

    def progress(done: int, total: int) -> None:
        # The host's bar counts steps.
        shared.state.sampling_steps, shared.state.sampling_step = 100, 100 * done // max(1, total)

    binding = merge_file(adapter, info.filename, out, at, dtype=dtype, progress=progress)
    sd_models.list_models()
    lines = [f"Saved: {out.name}", f"{len(binding.matched) - len(binding.idle)} of {len(adapter.entries)} layers merged."]
    lines += [f"Not applied: {printable(module)}: {printable(why)}" for module, why in binding.unmatched.items()]
    return "\n".join(lines)


@_told
def convert_file(name: str, base: str, title: str, target: str) -> str:
    """Write a file in another dialect -> what was done."""
    file, info = _file(name), _checkpoint(base)
    dialect = next(key for key, writer in WRITERS.items() if writer.title == title)
    adapter = files.read(file)
    root = Path(files.own_folder())
    root.mkdir(parents=True, exist_ok=True)
    out = _new(root, target or f"{Path(file.name).name}_{dialect}", "" if dialect == FOLDER else ".safetensors")
    with open_model(info.filename) as model:
        written = convert(adapter, model.index, out, dialect, base=model.weight, metadata=adapter.metadata)
    files.refresh()
    return f"Saved: {written.relative_to(root).as_posix()}\nListed at once; `<oft:…>` reads it as it reads {file.name}."


def _file(name: str | None) -> files.OFTFile:
    if not name:
        raise FileError(NO_FILES)
    return files.find(name)


def _checkpoint(title: str | None) -> Any:
    info = sd_models.checkpoints_list.get(title or "")
    if info is None:
        raise FileError("Choose a checkpoint", found=title or "none", expected="a safetensors checkpoint of the web UI's list")
    return info


def _new(folder: Path, name: str, ending: str) -> Path:
    """A path in a folder that is free. Raises FileError for names that lead elsewhere, and for one that is taken."""
    name = name.strip().removesuffix(".safetensors")
    out = folder / f"{name}{ending}"
    if not name or os.path.basename(name) != name or "\\" in name or name.startswith("."):
        raise FileError("This is no name for a new file", found=repr(name), expected="letters, digits, blanks, without / and \\")
    if out.exists():
        raise FileError("There is a file of this name already", file=out, hint="Choose another name; nothing was written.")
    return out
