"""Files that a host lists by name: which one a name means, and reading them once.

Names are paths below one of the host's folders, with / or \\ between their parts. Graphs and prompts of another system
may spell a name in another way: then it means the one listed file that it fits.
"""

from __future__ import annotations

import difflib
import json
import os
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable

from .adapter import Adapter, load_adapter
from .formats import ReadOptions
from .formats.keys import holds_oft
from .tensors import normal_tensors

EXTENSIONS = {".safetensors", ".sft"}
CONFIG = "adapter_config.json"

#: Longest header of a safetensors file, in bytes: the library's own limit.
_HEADER_BYTES = 100_000_000


# --- names --------------------------------------------------------------------------------------------------


def _parts(name: str) -> list[str]:
    """The folders and the file of a name, whichever slashes it has and however its accents are written."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    return [part for part in name.split("/") if part not in ("", ".")]


def _folded(parts: list[str]) -> list[str]:
    return [part.casefold() for part in parts]


def _without_ending(parts: list[str]) -> list[str]:
    stem, ending = os.path.splitext(parts[-1])
    return [*parts[:-1], stem] if ending.lower() in EXTENSIONS else parts


def meant(name: str, listed: Iterable[str]) -> list[str]:
    """The listed files that a name may mean: itself if it is there, else those that it fits best; [] for none.

    Better is: the same but for slashes; in other case; without its ending; with folders left out before it.
    """
    names = list(listed)
    if name in names:
        return [name]
    wanted = _parts(name) if name else []
    if not wanted:
        return []
    folded = _folded(wanted)
    parted = [(other, parts) for other in names if (parts := _parts(other))]

    def below(parts: list[str]) -> bool:
        return folded in (_folded(p)[-len(folded) :] for p in (parts, _without_ending(parts)))

    for fits in (
        lambda parts: parts == wanted,
        lambda parts: _folded(parts) == folded,
        lambda parts: _folded(_without_ending(parts)) == folded,
        below,
    ):
        if found := [other for other, parts in parted if fits(parts)]:
            return found
    return []


def nearest(name: str, listed: Iterable[str], count: int = 3) -> list[str]:
    """Listed names that resemble a name, the most similar first."""
    spelt: dict[str, list[str]] = {}
    for other in listed:
        parts = _folded(_without_ending(_parts(other)))
        for text in {"/".join(parts), parts[-1]}:
            spelt.setdefault(text, []).append(other)
    wanted = _folded(_without_ending(_parts(name) or [name]))
    close = [c for text in ("/".join(wanted), wanted[-1]) for c in difflib.get_close_matches(text, spelt, count)]
    return list(dict.fromkeys(other for text in close for other in spelt[text]))[:count]


# --- headers ------------------------------------------------------------------------------------------------


def header(path: str | os.PathLike) -> tuple[list[str], dict[str, str]]:
    """(names of the tensors, metadata) of a safetensors file, without reading the tensors.

    Raises OSError, or ValueError for what is no safetensors file.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _HEADER_BYTES:
            raise ValueError("no safetensors file")
        raw = file.read(size)
    try:
        entries = json.loads(raw)
    except RecursionError as error:
        raise ValueError("brackets without end") from error
    if not isinstance(entries, dict):
        raise ValueError("no safetensors file")  # noqa: TRY004
    metadata = entries.pop("__metadata__", None)
    known = metadata if isinstance(metadata, dict) else {}
    return list(entries), {k: v for k, v in known.items() if isinstance(v, str)}


def is_oft(path: str | os.PathLike) -> bool:
    """Whether a safetensors file holds rotations, as far as the names of its tensors tell. Unreadable files do not."""
    try:
        return holds_oft(header(path)[0])
    except (OSError, ValueError):
        return False


# --- reading ------------------------------------------------------------------------------------------------


def stamp(path: str) -> tuple[str, int, int, int]:
    """(path, mtime, size, mtime of a PEFT config beside it): it is read again when one of them changes. Raises OSError."""
    stat = os.stat(path)
    config = os.path.join(os.path.dirname(path), CONFIG)
    beside = os.stat(config).st_mtime_ns if os.path.isfile(config) else 0
    return path, stat.st_mtime_ns, stat.st_size, beside


class Readings:
    """Adapters that were read, kept while their files stay as they are.

    limit: bytes on disk of the files kept in memory; the newest one always stays.
    """

    def __init__(self, limit: int = 1 << 30):
        self.limit = limit
        self._kept: OrderedDict[tuple, tuple[Adapter, int]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: str, options: ReadOptions | None = None) -> Adapter:
        """The adapter in a file, from memory if the file has not changed. Raises what `load_adapter` raises, and OSError."""
        options = options or ReadOptions()
        key = (stamp(path), options)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            with normal_tensors():
                adapter = load_adapter(path, options)
            for earlier in [k for k in self._kept if k[0][0] == path and k[0] != key[0]]:
                del self._kept[earlier]  # the file has changed since
            self._kept[key] = (adapter, key[0][2])
            while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self.limit:
                self._kept.popitem(last=False)
            return adapter
