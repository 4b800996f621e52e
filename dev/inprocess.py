"""A real ComfyUI and this pack inside the running process, for tests of single functions."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parent.parent
#: The name under which the pack is imported, a folder of ComfyUI's ``custom_nodes``.
PACK = "comfyui_oft"


@functools.cache
def work_dir() -> Path:
    """Where the process' ComfyUI has its folders: an empty place that is removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="comfyui-inprocess-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    for name in ("models/loras", "input", "output", "temp", "user", "custom_nodes"):
        (path / name).mkdir(parents=True)
    return path


@functools.cache
def start(host_dir: Path) -> ModuleType:
    """Import ComfyUI from its folder, for the CPU and one thread, then the pack as ComfyUI would, which is returned. No server.

    The repository itself stays off the import path: its ``nodes`` would hide ComfyUI's module of that name.
    """
    sys.path[:0] = [str(host_dir), str(REPO / "dev" / "host_nodes")]
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(work_dir())
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(PACK, REPO / "__init__.py", submodule_search_locations=[str(REPO)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = pack
    spec.loader.exec_module(pack)
    return pack
