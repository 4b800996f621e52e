"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from .errors import FileError

PARTIAL = ".partial"


def atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it. The folder is made if it is not there.

    Raises what ``write`` raises, and FileError where the disk or a folder refuses; the temporary file is gone then. Only a killed
    process leaves one: see ``remove_partials``.
    """
    all_or_none({path: write})


def all_or_none(files: Mapping[Path, Callable[[str], object]]) -> None:
    """``atomically`` for files that belong together: none is renamed before all are written. Only a kill between two renamings,
    which follow each other at once, could leave some of them old.
    """
    for path in files:
        check_target(path)
    written: dict[Path, str] = {}
    path = Path()
    try:
        try:
            for path, write in files.items():  # noqa: B007 (the file at which it failed is named)
                path.parent.mkdir(parents=True, exist_ok=True)
                handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
                written[path] = temporary
                os.close(handle)
                write(temporary)
                os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets the owner alone read
                sync(temporary)
            for path in list(written):
                os.replace(written[path], path)
                del written[path]
        except BaseException:
            for temporary in written.values():
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            raise
    except (OSError, SafetensorError) as error:
        raise FileError("The file cannot be written", file=path, found=reason(error)) from error


def sync(path: str | os.PathLike) -> None:
    """Wait until the file's bytes are on the disk. Some file systems, those of networks above all, find only now that they are full."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def reason(error: BaseException) -> str:
    """Why the system refused, in its own words."""
    return getattr(error, "strerror", None) or str(error)


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
