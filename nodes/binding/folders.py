"""Where OFT files are looked for, and reading them once.

Files are named by their path below one of the folders, as ComfyUI's own loaders do. Only names that ComfyUI's
folder list resolves are opened, so a prompt cannot name a file elsewhere on the disk. Workflows of another system
may spell a name in another way: then it means the one listed file that it fits.
"""

from __future__ import annotations

import logging
import os

import folder_paths

from ...oft_core import Adapter, FileError, ReadOptions, listed
from ...oft_core.errors import printable
from ...oft_core.listed import EXTENSIONS

log = logging.getLogger("oft")

FOLDER = "oft"


def register() -> None:
    """Add `models/oft` and the lora folders to the `oft` folder list.

    extra_model_paths.yaml is read before custom nodes are loaded and may have made the list already: its
    folders stay first.
    """
    paths = list(folder_paths.folder_names_and_paths.get(FOLDER, ([], set()))[0])
    own = os.path.join(folder_paths.models_dir, FOLDER)
    for path in (own, *folder_paths.get_folder_paths("loras")):
        if path not in paths:
            paths.append(path)
    os.makedirs(own, exist_ok=True)
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(EXTENSIONS))


def names() -> list[str]:
    """Names for the file combo, sorted."""
    return folder_paths.get_filename_list(FOLDER)


def reads(path: str) -> bool:
    """Whether files with this name are opened at all."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def find(name: str) -> str | None:
    """Full path of the file called `name`, or None."""
    return folder_paths.get_full_path(FOLDER, name) if name else None


# --- names from elsewhere -----------------------------------------------------------------------------------


def meant(name: str) -> list[str]:
    """The listed files that a name may mean; see `listed.meant`."""
    return [name] if find(name) else listed.meant(name, names())


def nearest(name: str, count: int = 3) -> list[str]:
    """Listed names that resemble a name, the most similar first."""
    return listed.nearest(name, names(), count)


def locate(name: str) -> str:
    """The listed name of the file that `name` means. Raises FileError if that is none, or more than one."""
    found = meant(name)
    if len(found) == 1:
        return found[0]
    if found:
        raise FileError(
            "Several files fit this name", file=name, found=", ".join(found), expected="the name of one of them",
            hint="Choose the file that is meant in the node.",
        )
    similar = nearest(name) if name else []
    raise FileError(
        "There is no file of this name in models/oft or the lora folders",
        file=name,
        found=f"similar names: {', '.join(similar)}" if similar else None,
        hint="Put the file into models/oft, then press R on the page to refresh the list.",
    )


def other_name(name: str) -> str | None:
    """In words, which file is read for a name that is not listed as it is spelt; None for one that is."""
    found = locate(name)
    return None if found == name else f"'{printable(name)}' is not listed here; read from {printable(found)}."


# --- reading ------------------------------------------------------------------------------------------------


def fingerprint(name: str) -> str:
    """A string that changes when the file that `name` means does; empty if there is no such one."""
    found = meant(name)
    path = find(found[0]) if len(found) == 1 else None
    return "|".join(map(str, listed.stamp(path))) if path else ""


_readings = listed.Readings()


def read(name: str, options: ReadOptions | None = None) -> Adapter:
    """The adapter in the file that `name` means, from memory if the file has not changed since it was read.

    Raises what `locate` raises, and what `load_adapter` raises for a bad file.
    """
    if (said := other_name(name)) is not None:
        log.warning("OFT: %s", said)
    return _readings.read(find(locate(name)), options)
