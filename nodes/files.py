"""Names and places of files that the nodes write."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from safetensors import SafetensorError, safe_open

from ..oft_core.training import ConfigError
from . import folders

# Metadata of a file that a training wrote: which run's it is.
RUN = "oft_run"


def new_file(prefix: str, root: str) -> Path:
    """A free path `root/prefix_00001_.safetensors`, the number one above the highest. Raises ConfigError."""
    if not prefix.strip(" ./\\"):
        # The host would make a hidden file of it.
        raise ConfigError("A file cannot be saved without a name", found=repr(prefix), expected="such as training/subject")
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    except Exception as error:  # the host raises plain Exception for paths outside
        raise ConfigError("A file cannot be saved under this name", found=prefix, hint=str(error)) from error
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def listed(path: Path) -> str:
    """The path as the loader's list shows it."""
    for root in folder_paths.get_folder_paths(folders.FOLDER):
        if (name := inside(path, root)) is not None:
            return name
    return str(path)


def inside(path: str | os.PathLike, root: str | os.PathLike) -> str | None:
    """The path as seen from the folder `root`, or None if it leads elsewhere."""
    try:
        name = os.path.relpath(os.path.abspath(path), os.path.abspath(root))
    except ValueError:  # another drive, on Windows
        return None
    return None if name.split(os.sep)[0] == os.pardir else name


def header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty if there is no such file or it cannot be read."""
    try:
        with safe_open(path, "pt") as f:
            return dict(f.metadata() or {})
    except (SafetensorError, OSError):
        return {}
