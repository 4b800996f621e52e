"""Where OFT files are looked for, and reading them once.

Files are named by their path below one of the folders, as ComfyUI's own loaders do. Only names that ComfyUI's
folder list resolves are opened, so a prompt cannot name a file elsewhere on the disk.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import folder_paths

from ..oft_core import Adapter, FileError, ReadOptions, load_adapter
from .cache import normal_tensors

FOLDER = "oft"
EXTENSIONS = {".safetensors"}
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


def _stamp(path: str) -> tuple[str, int, int, int]:
    """(path, mtime, size, mtime of a PEFT config beside it): it is read again when one of them changes."""
    stat = os.stat(path)
    config = os.path.join(os.path.dirname(path), CONFIG)
    beside = os.stat(config).st_mtime_ns if os.path.isfile(config) else 0
    return path, stat.st_mtime_ns, stat.st_size, beside


def fingerprint(name: str) -> str:
    """A string that changes when the file called `name` does; empty if it is missing."""
    path = find(name)
    return "|".join(map(str, _stamp(path))) if path else ""


_cache: OrderedDict[tuple, tuple[Adapter, int]] = OrderedDict()
_lock = threading.Lock()


def read(name: str, options: ReadOptions | None = None) -> Adapter:
    """The adapter in the file called `name`, from memory if the file has not changed since it was read.

    Raises `FileError` if the name is not in the folder list, and what `load_adapter` raises for a bad file.
    """
    path = find(name)
    if path is None:
        raise FileError(
            "There is no file of this name in models/oft or the lora folders",
            file=name,
            hint="Put the file into models/oft, then press R on the page to refresh the list.",
        )
    options = options or ReadOptions()
    stamp = (_stamp(path), options)
    with _lock:
        if stamp in _cache:
            _cache.move_to_end(stamp)
            return _cache[stamp][0]
        with normal_tensors():
            adapter = load_adapter(path, options)
        _cache[stamp] = (adapter, stamp[0][2])
        while len(_cache) > 1 and sum(size for _, size in _cache.values()) > CACHE_BYTES:
            _cache.popitem(last=False)
        return adapter
