"""Files that are whole or not there."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import FileError

PARTIAL = ".partial"


def atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it.

    Raises what ``write`` raises, and FileError where the disk or a folder refuses; the temporary file is gone then. Only a killed
    process leaves one: see ``remove_partials``.
    """
    check_target(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        os.close(handle)
        try:
            write(temporary)
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets the owner alone read
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError("The file cannot be written", file=path, found=reason) from error


def check_target(path: Path) -> None:
    """Raises FileError if ``path`` is a folder, a device or anything else that a file must not take the place of."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or another special file"
        raise FileError("The output is not a file's name", file=path, found=what, hint="Choose another output name.")


def remove_partials(folder: Path, stem: str) -> None:
    """Delete what a killed process left of files in ``folder`` whose names begin with ``stem``."""
    for rest in folder.glob(f".{glob.escape(stem)}*{PARTIAL}"):
        rest.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
