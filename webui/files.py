"""OFT files as the web UI names them: found in the folders, listed once, read once.

A file is called by its name without folder and ending, as the web UIs do with LoRAs; where two files share it, by its
path below the folder. A folder that PEFT saved is called by the folder's name.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modules import cache as host_cache
from modules import paths, shared

from ..oft_core import Adapter, FileError, ReadOptions, listed
from . import settings

#: What PEFT calls the file in a folder that it saves; the folder bears the name.
_IN_FOLDER = {"adapter_model", "pytorch_lora_weights", "diffusion_pytorch_model"}
_TITLE = "oft/"


@dataclass(frozen=True)
class OFTFile:
    """One file. name: as a tag says it.   path: absolute.   root: the folder it was found below.   metadata: of its header."""

    name: str
    path: str
    root: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The path without ending, beside which the web UIs keep previews and notes."""
        return os.path.splitext(self.path)[0]

    @property
    def alias(self) -> str:
        """The name that the trainer gave it, or its name."""
        return self.metadata.get("ss_output_name", "").strip() or self.name

    @property
    def sha256(self) -> str:
        """SHA-256 of the tensors without the header, which is Civitai's AutoV3, kept by the host's cache."""
        return _kept("oft-hashes", self.path, lambda: _digest(self.path)) or ""

    @property
    def shorthash(self) -> str:
        return self.sha256[:12]


def own_folder() -> str:
    """The folder that is named after us: --oft-dir, or models/OFT."""
    return getattr(shared.cmd_opts, "oft_dir", None) or os.path.join(paths.models_path, "OFT")


def folders() -> list[str]:
    """Where files are looked for, without repetitions: our own folder, those of the settings, the LoRA folder."""
    found = [own_folder(), *settings.more_folders(), getattr(shared.cmd_opts, "lora_dir", "")]
    unique = {os.path.normcase(os.path.abspath(path)): os.path.abspath(path) for path in reversed(found) if path}
    return list(unique.values())[::-1]


_files: dict[str, OFTFile] = {}
#: The other safetensors files there, so that a tag that names one is told what it is.
_others: dict[str, OFTFile] = {}
_lock = threading.Lock()
_readings = listed.Readings()


def refresh() -> dict[str, OFTFile]:
    """Look through the folders again; name -> file, our own folder's first. A folder that is not there is empty."""
    found: dict[str, OFTFile] = {}
    others: dict[str, OFTFile] = {}
    for root in folders():
        for path in _below(root):
            place = found if _is_oft(path) else others
            name, full = _names(path, root)
            name = name if name not in place else full
            if name not in place:
                place[name] = OFTFile(name, path, root, _metadata(path) if place is found else {})
    with _lock:
        for known, now in ((_files, found), (_others, others)):
            known.clear()
            known.update(now)
    return found


def all_files() -> list[OFTFile]:
    """The files known so far."""
    with _lock:
        known = list(_files.values())
    return known or list(refresh().values())


def get(name: str) -> OFTFile | None:
    """The listed file of exactly this name."""
    with _lock:
        return _files.get(name)


def find(name: str) -> OFTFile:
    """The file that a tag's name means; the folders are looked through again where none does.

    A file without rotations, or a damaged one, is found where no other fits: reading it says what is wrong. Raises FileError
    if no file fits, or more than one.
    """
    found = _meant(name, all_files())
    if not found or not os.path.isfile(found[0].path):
        found = _meant(name, refresh().values()) or _meant(name, _others.values())
    if len(found) == 1:
        return found[0]
    if found:
        raise FileError(
            "Several files fit this name", file=name, found=", ".join(f.name for f in found), expected="the name of one of them"
        )
    similar = listed.nearest(name, [f.name for f in all_files()])
    raise FileError(
        "There is no OFT file of this name", file=name, found=f"similar names: {', '.join(similar)}" if similar else None,
        expected=f"a file in {' or '.join(folders())}",
    )


def read(file: OFTFile, options: ReadOptions | None = None) -> Adapter:
    """The adapter in a file, from memory if it has not changed. Raises what `load_adapter` raises."""
    try:
        return _readings.read(file.path, options)
    except OSError as error:
        raise FileError("The file cannot be read", file=file.path, found=error.strerror or str(error)) from error


def by_hash(shorthash: str) -> OFTFile | None:
    """The file with these first characters of its hash."""
    return next((f for f in all_files() if shorthash and f.sha256.startswith(shorthash)), None)


def _meant(name: str, known: Iterable[OFTFile]) -> list[OFTFile]:
    known = list(known)
    by_name = {f.name: f for f in known}
    # Names first, then paths below the folders, then what the trainer called them.
    found = [by_name[n] for n in listed.meant(name, by_name)]
    if not found:
        by_path = {os.path.relpath(f.path, f.root): f for f in known}
        found = [by_path[n] for n in listed.meant(name, by_path)]
    return found or [f for f in known if f.alias == name]


def _below(root: str) -> Iterator[str]:
    """Paths of the safetensors files below a folder, sorted; not those in hidden folders, where trainings keep theirs."""
    for folder, inside, names in os.walk(root, followlinks=True):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in listed.EXTENSIONS:
                yield os.path.join(folder, name)


def _names(path: str, root: str) -> tuple[str, str]:
    """(short name, path below the root without ending), with / between the parts."""
    stem = Path(path).with_suffix("")
    if stem.name in _IN_FOLDER and stem.parent != Path(root):
        stem = stem.parent
    return stem.name, stem.relative_to(root).as_posix()


def _is_oft(path: str) -> bool:
    return bool(_kept("oft-files", path, lambda: {"oft": listed.is_oft(path)}, default={}).get("oft"))


def _metadata(path: str) -> dict[str, str]:
    try:
        return listed.header(path)[1]
    except (OSError, ValueError):
        return {}


def _kept(section: str, path: str, make, default=None):
    """What was made of a file, kept by the host until the file changes; ``default`` for a file that is gone."""
    try:
        return host_cache.cached_data_for_file(section, _TITLE + path, path, make)
    except OSError:
        return default


def _digest(path: str) -> str:
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while part := file.read(1 << 20):
            hashed.update(part)
    return hashed.hexdigest()
