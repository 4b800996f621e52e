"""The tab's part "Train": pictures in a folder to a file in the list, with samples and the loss while it runs.

Only features that gradio 3.41 and 4.40 share.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from modules import call_queue, shared
from PIL import Image

from ...oft_core.errors import AdapterError, printable
from ...oft_core.training import ConfigError
from ...oft_core.training.dataset import build as gather
from ...oft_core.training.dataset import to_pillow
from ...oft_core.training.plan import make_config, make_plan
from ...oft_core.training.presets import TRAIN_PRESETS
from ...oft_core.training.run import Outcome, loss_curve
from .. import files, hosts
from .run import Stopped, WebRun

JOB = "OFT training"
#: Seconds between two looks at what the training says, and pictures that the gallery shows.
PAUSE, SHOWN = 0.5, 12
_one_at_a_time = threading.Lock()


def build() -> None:
    """The controls, inside a tab of gradio."""
    gr.Markdown(
        "Teaches the loaded model (SD 1.x, SD 2.x, SDXL) a subject or a style from 5 to 20 pictures. The model itself stays as it is. "
        "Stopping keeps the work; the same inputs go on exactly where they stopped."
    )
    with gr.Row():
        with gr.Column():
            folder = gr.Textbox(label="Folder of pictures (on the machine of the web UI), captions beside them", elem_id="oft_train_folder")
            with gr.Row():
                trigger = gr.Textbox(label="Trigger: a word that means nothing", value="zwx", elem_id="oft_train_trigger")
                instance = gr.Textbox(label="Prompt for pictures without a caption", value="a photo of [trigger]", elem_id="oft_train_instance")
            class_prompt = gr.Textbox(
                label="Class prompt: what the subject is in general, keeps the class as it is", placeholder="a photo of a dog",
                elem_id="oft_train_class",
            )
            with gr.Row():
                preset = gr.Dropdown(label="Preset", choices=list(TRAIN_PRESETS), value="subject", elem_id="oft_train_preset")
                steps = gr.Number(label="Steps", value=800, precision=0, elem_id="oft_train_steps")
                rate = gr.Number(label="Learning rate", value=0.001, elem_id="oft_train_rate")
                block = gr.Number(label="Block size", value=32, precision=0, elem_id="oft_train_block")
            with gr.Row():
                resolution = gr.Number(label="Resolution", value=512, precision=0, elem_id="oft_train_resolution")
                batch = gr.Number(label="Batch size", value=1, precision=0, elem_id="oft_train_batch")
                seed = gr.Number(label="Seed", value=0, precision=0, elem_id="oft_train_seed")
                memory = gr.Dropdown(label="Memory", choices=["checkpointing", "off"], value="checkpointing", elem_id="oft_train_memory")
            prompts = gr.Textbox(
                label="Sample prompts, one a line; [trigger] stands for the trigger", lines=2, value="a photo of [trigger]",
                elem_id="oft_train_prompts",
            )
            with gr.Row():
                every = gr.Number(label="Steps between samples (0: only at the end)", value=100, precision=0, elem_id="oft_train_every")
                sample_steps = gr.Number(label="Steps of a sample", value=20, precision=0, elem_id="oft_train_sample_steps")
                name = gr.Textbox(label="Name of the file, in models/OFT", value="my_subject", elem_id="oft_train_name")
            resume = gr.Checkbox(label="Go on where the same training was stopped", value=True, elem_id="oft_train_resume")
            with gr.Row():
                go = gr.Button("Train", variant="primary", elem_id="oft_train_go")
                halt = gr.Button("Stop and keep", elem_id="oft_train_stop")
        with gr.Column():
            status = gr.Textbox(label="State and report", lines=10, max_lines=40, interactive=False, elem_id="oft_train_status")
            curve = gr.Image(label="Loss", interactive=False, elem_id="oft_train_curve")
            gallery = gr.Gallery(label="Samples, the newest last", elem_id="oft_train_samples")
    inputs = [folder, trigger, instance, class_prompt, preset, steps, rate, block, resolution, batch, seed, memory, prompts, every,
              sample_steps, name, resume]  # fmt: skip
    go.click(fn=train, inputs=inputs, outputs=[status, gallery, curve])
    halt.click(fn=stop, inputs=[], outputs=[])


class _Work:
    """One training in a thread of its own, and what it has said so far."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.line, self.samples, self.said = "Waiting for the web UI to be free", [], 0
        self.run: WebRun | None = None
        self.outcome: Outcome | None = None
        self.fault: str | None = None
        self.thread = threading.Thread(target=self._work, name=JOB, daemon=True)

    def shown(self, line: str, picture: Image.Image | None) -> None:
        self.line = line
        if picture is not None:
            self.samples = [*self.samples, picture][-SHOWN:]
        self.said += 1

    def _work(self) -> None:
        with call_queue.queue_lock:
            shared.state.begin(job=JOB)
            try:
                self.outcome = self._trained()
            except Stopped:
                done = self.run.trainer.step if self.run is not None and self.run.trainer is not None else 0
                self.fault = self.line if done else "Stopped before the first step; nothing was written."
            except AdapterError as error:
                self.fault = str(error)
            except OSError as error:
                self.fault = f"{error.strerror or error}; file: {printable(str(error.filename or ''), 1000)}"
            finally:
                shared.state.end()
                files.refresh()

    def _trained(self) -> Outcome:
        given = self.inputs
        folder = given["folder"].strip()
        if not folder or not Path(folder).is_dir():
            raise ConfigError("There is no such folder of pictures", found=folder or "none", expected="a folder on the web UI's machine")
        self.shown("Reading pictures", None)
        of = gather(
            folder=Path(folder), trigger=given["trigger"].strip(), instance_prompt=given["instance"], class_prompt=given["class_prompt"].strip(),
            resolution=int(given["resolution"]),
        )
        plan = make_plan(
            dataset=of, preset=given["preset"], steps=int(given["steps"]), learning_rate=float(given["rate"]), block_size=int(given["block"]),
            coft="off", coft_degrees=15.0, coft_eps=1.0, seed=int(given["seed"]), sample_prompts=given["prompts"],
            sample_every=int(given["every"]), save_every=0, low_vram=given["memory"], resume=bool(given["resume"]), name=given["name"].strip(),
            config=make_config(sample_steps=int(given["sample_steps"]), batch_size=int(given["batch"])),
        )
        self.shown("Loading the model", None)
        host = hosts.current()
        self.run = WebRun(plan, of, host, host.chosen(), self.shown)
        return self.run()


def train(*inputs: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Train with the tab's values -> (state or report, samples, loss curve), again and again while it runs."""
    names = ("folder", "trigger", "instance", "class_prompt", "preset", "steps", "rate", "block", "resolution", "batch", "seed", "memory",
             "prompts", "every", "sample_steps", "name", "resume")  # fmt: skip
    if not _one_at_a_time.acquire(blocking=False):
        yield "A training runs already. Press *Stop and keep* to end it.", gr.update(), gr.update()
        return
    try:
        work = _Work(dict(zip(names, inputs, strict=True)))
        work.thread.start()
        seen = -1
        while work.thread.is_alive():
            if work.said != seen:
                seen = work.said
                yield work.line, list(work.samples), _curve(work.run)
            work.thread.join(PAUSE)
        report = work.fault if work.outcome is None else f"{work.outcome.report}\nIn the list at once: <oft:{_tag(work.outcome.name)}:1>"
        yield report or "The training ended with an error; the console says which.", list(work.samples), _curve(work.run)
    finally:
        _one_at_a_time.release()


def _tag(name: str) -> str:
    return Path(name).stem


def _curve(run: WebRun | None) -> Any:
    losses = list(run.trainer.losses) if run is not None and run.trainer is not None else []
    return to_pillow(loss_curve(losses)[0]) if losses else gr.update()


def stop() -> None:
    """End the training that runs, as the host's Interrupt does; what was learnt is kept. Other work is left alone."""
    if shared.state.job == JOB:
        shared.state.interrupt()
