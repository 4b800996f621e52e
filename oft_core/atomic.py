"""Files that are whole or not there."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from .errors import FileError

PARTIAL = ".partial"


def atomically(path: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a temporary file in a hidden folder beside ``path``, then rename it. ``path``'s folder is made if need be.

    Raises what ``write`` raises, and FileError where the disk or a folder refuses; nothing temporary is left then. Only a killed
    process leaves such a folder, with all that libraries write beside the file (safetensors does): see ``remove_partials``.
    """
    all_or_none({path: write})


def all_or_none(files: Mapping[Path, Callable[[str], object]]) -> None:
    """``atomically`` for files that belong together: none is renamed before all are written. Only a kill between two renamings,
    which follow each other at once, could leave some of them old.
    """
    for path in files:
        check_target(path)
    places: dict[Path, str] = {}
    path = Path()
    try:
        try:
            for path, write in files.items():  # the error names the one at which it failed
                path.parent.mkdir(parents=True, exist_ok=True)
                places[path] = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
                temporary = os.path.join(places[path], "file")  # no list of models shows such a name
                write(temporary)
                os.chmod(temporary, 0o666 & ~_umask())  # safetensors lets the owner alone read
                sync(temporary)
            for path, place in places.items():
                os.replace(os.path.join(place, "file"), path)
        finally:
            for place in places.values():
                shutil.rmtree(place, ignore_errors=True)
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
        remove_partial(rest)


def remove_partial(rest: Path) -> None:
    if rest.is_dir():
        shutil.rmtree(rest, ignore_errors=True)
    else:
        rest.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
