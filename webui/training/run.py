"""A training run in the web UI: its folders, its progress in the host's bar, its way of being stopped."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from modules import shared
from PIL import Image

from ...oft_core.training import TrainingError
from ...oft_core.training.dataset import TrainingSet
from ...oft_core.training.filenames import inside, portable
from ...oft_core.training.plan import Plan
from ...oft_core.training.run import TrainingRun
from .. import files
from ..hosts.contract import Host
from .model import WebModel


class Stopped(Exception):
    """The user has pressed the host's Interrupt or our Stop."""


class WebRun(TrainingRun):
    """One training on the loaded model.

    shown: is told what the page shows: a line, and the newest sample or None.
    """

    Stopped = Stopped

    def __init__(self, plan: Plan, dataset: TrainingSet, host: Host, sd_model: Any, shown: Callable[[str, Image.Image | None], object]):
        self.shown = shown
        trainee = host.trainee(sd_model)
        model = WebModel(trainee, host.parts(sd_model), low_vram=plan.low_vram, interrupted=self.interrupted)
        with trainee.ready():  # what an earlier picture's tags have done is no part of it
            known = identity(trainee.net)
        # The text encoders and the VAE come with the checkpoint, or are chosen in the host's settings.
        beside = f"{trainee.file} {getattr(shared.opts, 'sd_vae', '')} {getattr(shared.opts, 'CLIP_stop_at_last_layers', 1)}"
        digests = {"model": known, "clip": beside, "vae": beside, "pictures": dataset.digest}
        super().__init__(plan, dataset, model, digests, Path(trainee.file) if trainee.file else None, host.title)

    def __call__(self):
        with self.host.trainee.ready(), torch.inference_mode(False), torch.enable_grad():
            return super().__call__()

    def state_root(self) -> Path:
        return Path(files.own_folder()) / ".training"

    def new_file(self, name: str) -> Path:
        """`name_00001.safetensors`, the number one above the highest. Raises ConfigError."""
        path = Path(files.own_folder()) / portable(name)
        taken = [
            int(found[1]) for other in (path.parent.iterdir() if path.parent.is_dir() else ())
            if (found := re.fullmatch(rf"{re.escape(path.name)}_(\d+)\.safetensors", other.name))
        ]
        return path.with_name(f"{path.name}_{max(taken, default=0) + 1:05}.safetensors")

    def listed(self, path: Path) -> str:
        return inside(path, files.own_folder()) or str(path)

    def say(self, text: str) -> None:
        shared.state.textinfo = text
        self.shown(text, None)
        self.interrupted()

    def tick(self, step: int, steps: int, picture: Image.Image | None = None) -> None:
        shared.state.sampling_step, shared.state.sampling_steps = step, steps
        if picture is not None:
            self.shown(f"Step {step} of {steps}", picture)
        self.interrupted()

    def interrupted(self) -> None:
        if shared.state.interrupted or shared.state.stopping_generation:
            raise Stopped

    @contextlib.contextmanager
    def memory_explained(self) -> Iterator[None]:
        found = ""
        try:
            yield
        except torch.OutOfMemoryError as error:
            found = str(error).splitlines()[0]
        if found:
            # Raised out here so that the traceback does not keep the tensors alive.
            self.free_memory()
            raise TrainingError(
                "Out of memory while the training was prepared or a sample was drawn", found=found, hint="Lower the resolution."
            )

    def free_memory(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def identity(net: torch.nn.Module, most: int = 512) -> str:
    """A short hash of a model: names, shapes and up to `most` evenly spaced values of every weight."""
    seen = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        flat = value.detach().reshape(-1)
        part = flat[:: max(1, flat.numel() // most)][:most].contiguous().cpu().view(torch.uint8) if flat.numel() else flat.cpu()
        seen.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + part.numpy().tobytes())
    return seen.hexdigest()[:32]
