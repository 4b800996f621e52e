"""Where OFT files are looked for, and reading them once.

Files are named by their path below one of the folders, as ComfyUI's own loaders do. Only names that ComfyUI's
folder list resolves are opened, so a prompt cannot name a file elsewhere on the disk. Workflows of another system
may spell a name in another way: then it means the one listed file that it fits.
"""

from __future__ import annotations

import difflib
import logging
import os
import threading
import unicodedata
from collections import OrderedDict

import folder_paths

from ...oft_core import Adapter, FileError, ReadOptions, load_adapter
from ...oft_core.errors import printable
from ...oft_core.tensors import normal_tensors

log = logging.getLogger("oft")

FOLDER = "oft"
EXTENSIONS = {".safetensors", ".sft"}
CONFIG = "adapter_config.json"

# Files kept in memory after reading, in bytes on disk. The newest one always stays.
CACHE_BYTES = 1 << 30


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


def _parts(name: str) -> list[str]:
    """The folders and the file of a name, whichever slashes it has and however its accents are written."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    return [part for part in name.split("/") if part not in ("", ".")]


def _folded(parts: list[str]) -> list[str]:
    return [part.casefold() for part in parts]


def _without_ending(parts: list[str]) -> list[str]:
    stem, ending = os.path.splitext(parts[-1])
    return [*parts[:-1], stem] if ending.lower() in EXTENSIONS else parts


def meant(name: str) -> list[str]:
    """The listed files that a name may mean: itself if it is there, else those that it fits best; [] for none.

    Better is: the same but for slashes; in other case; without its ending; with folders left out before it.
    """
    if find(name):
        return [name]
    wanted = _parts(name) if name else []
    if not wanted:
        return []
    folded = _folded(wanted)
    listed = [(other, _parts(other)) for other in names()]

    def below(parts: list[str]) -> bool:
        return folded in (_folded(p)[-len(folded) :] for p in (parts, _without_ending(parts)))

    for fits in (
        lambda parts: parts == wanted,
        lambda parts: _folded(parts) == folded,
        lambda parts: _folded(_without_ending(parts)) == folded,
        below,
    ):
        if found := [other for other, parts in listed if fits(parts)]:
            return found
    return []


def nearest(name: str, count: int = 3) -> list[str]:
    """Listed names that resemble a name, the most similar first."""
    spelt: dict[str, list[str]] = {}
    for other in names():
        parts = _folded(_without_ending(_parts(other)))
        for text in {"/".join(parts), parts[-1]}:
            spelt.setdefault(text, []).append(other)
    wanted = _folded(_without_ending(_parts(name) or [name]))
    close = [c for text in ("/".join(wanted), wanted[-1]) for c in difflib.get_close_matches(text, spelt, count)]
    return list(dict.fromkeys(other for text in close for other in spelt[text]))[:count]


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


def _stamp(path: str) -> tuple[str, int, int, int]:
    """(path, mtime, size, mtime of a PEFT config beside it): it is read again when one of them changes."""
    stat = os.stat(path)
    config = os.path.join(os.path.dirname(path), CONFIG)
    beside = os.stat(config).st_mtime_ns if os.path.isfile(config) else 0
    return path, stat.st_mtime_ns, stat.st_size, beside


def fingerprint(name: str) -> str:
    """A string that changes when the file that `name` means does; empty if there is no such one."""
    found = meant(name)
    path = find(found[0]) if len(found) == 1 else None
    return "|".join(map(str, _stamp(path))) if path else ""


_cache: OrderedDict[tuple, tuple[Adapter, int]] = OrderedDict()
_lock = threading.Lock()


def read(name: str, options: ReadOptions | None = None) -> Adapter:
    """The adapter in the file that `name` means, from memory if the file has not changed since it was read.

    Raises what `locate` raises, and what `load_adapter` raises for a bad file.
    """
    if (said := other_name(name)) is not None:
        log.warning("OFT: %s", said)
    path = find(locate(name))
    options = options or ReadOptions()
    stamp = (_stamp(path), options)
    with _lock:
        if stamp in _cache:
            _cache.move_to_end(stamp)
            return _cache[stamp][0]
        with normal_tensors():
            adapter = load_adapter(path, options)
        for earlier in [key for key in _cache if key[0][0] == path and key[0] != stamp[0]]:
            del _cache[earlier]  # the file has changed since
        _cache[stamp] = (adapter, stamp[0][2])
        while len(_cache) > 1 and sum(size for _, size in _cache.values()) > CACHE_BYTES:
            _cache.popitem(last=False)
        return adapter
