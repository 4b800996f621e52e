"""Names and places of files that the nodes write."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...oft_core.training import ConfigError
from ...oft_core.training.filenames import inside, portable
from . import folders


def new_file(prefix: str, root: str) -> Path:
    """A free path `root/prefix_00001_.safetensors`, the number one above the highest. Raises ConfigError."""
    prefix = portable(prefix)
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
