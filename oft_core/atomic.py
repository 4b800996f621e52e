"""Files that are whole or not there."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial"


def atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it.

    Raises what ``write`` raises; the temporary file is gone then. Only a killed process leaves one: see ``remove_partials``.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets the owner alone read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove_partials(folder: Path, stem: str) -> None:
    """Delete what a killed process left of files in ``folder`` whose names begin with ``stem``."""
    for rest in folder.glob(f".{glob.escape(stem)}*{PARTIAL}"):
        rest.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
