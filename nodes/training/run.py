"""A training run inside ComfyUI: its folders, its progress under the node, its way of being stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfyui_version import __version__ as host_version
from PIL import Image

from ...oft_core.training.dataset import TrainingSet
from ...oft_core.training.plan import Plan
from ...oft_core.training.run import TrainingRun
from ..binding import folders
from ..binding.files import listed, new_file
from . import mode
from .host import HostModel
from .identity import identity, model_file


def state_root() -> Path:
    """Where runs keep their state: a private folder of the user directory."""
    own = getattr(folder_paths, "get_system_user_directory", None)
    root = own("oft") if own else os.path.join(folder_paths.get_user_directory(), "__oft")
    return Path(root) / "training"


class Run(TrainingRun):
    """One run of the node Train OFT."""

    Stopped = mode.Stopped

    def __init__(
        self,
        plan: Plan,
        dataset: TrainingSet,
        model: Any,
        clip: Any,
        vae: Any,
        node_id: Any,
        prompt: Any = None,
    ):
        self.node_id = node_id
        host = HostModel(
            model,
            clip,
            vae,
            low_vram=plan.low_vram,
            guidance=plan.guidance,
            train_encoders=bool(plan.encoders),
        )
        known = {
            "model": identity(model),
            "clip": f"{identity(clip.patcher)} {clip.layer_idx}",
            "vae": identity(vae.patcher),
            "pictures": dataset.digest,
        }
        super().__init__(plan, dataset, host, known, model_file(model, prompt, node_id), host_version)
        self.bar = comfy.utils.ProgressBar(plan.settings.steps, node_id=node_id)

    def state_root(self) -> Path:
        return state_root()

    def new_file(self, name: str) -> Path:
        return new_file(name, folder_paths.get_folder_paths(folders.FOLDER)[0])

    def listed(self, path: Path) -> str:
        return listed(path)

    def say(self, text: str) -> None:
        """A line under the node; not more often than the page can show."""
        # Not imported: without a running server there is nobody to tell.
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        send = getattr(server, "send_progress_text", None)
        if send is not None and self.node_id is not None:
            send(text, self.node_id)

    def tick(self, step: int, steps: int, picture: Image.Image | None = None) -> None:
        # Raises where the run was stopped on the page.
        self.bar.update_absolute(step, steps, picture and ("JPEG", picture, 512))

    def interrupted(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def memory_explained(self):
        return mode.memory_explained()

    def free_memory(self) -> None:
        mode.free_memory()
