"""What training keeps on disk between runs: latents and embeddings that do not change, and folders of old runs; and how much of it.

Where that is, the host says. What was used longest ago goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..atomic import PARTIAL, atomically, remove_partial
from ..errors import FileError
from .checkpoint import from_tensors, saved_states, to_tensors

log = logging.getLogger("oft")

# Size of the cache of latents, embeddings and class pictures, in bytes.
CACHE_BYTES = 2 << 30
# Completed runs that are kept, and days for which a run that can go on is kept.
KEPT_RUNS, KEPT_DAYS = 10, 30
FORMAT = "oft training cache 1"
RESULT = "result-*.json"


def digest(value: Any) -> str:
    """A short hash of plain values; for other things, of their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def fingerprint(value: Any) -> Any:
    """Plain values and tensors in nested lists and dicts, with a hash of all its bytes for each tensor.

    Raises TypeError for anything else, since it may change without its text changing.
    """
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, dict):
        return {str(k): fingerprint(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"no fingerprint of a {type(value).__name__}")


class Store:
    """Values by key, one file each, in `folder`. A damaged file is made again; a full disk only costs the time that it saves.

    version: of the host, whose models may compute otherwise in another one.   found, made: how many values were read, and how many
    were new, since the store was opened.
    """

    def __init__(self, folder: Path, version: str = "", limit: int | None = None):
        self.folder, self.version, self.limit = folder, version, CACHE_BYTES if limit is None else limit
        self.found = self.made = 0
        self._used: set[Path] = set()

    def path(self, *key: Any) -> Path:
        """The file of a key: plain values that say all that the value depends on, host and versions aside."""
        return self.folder / f"{digest([FORMAT, self.version, torch.__version__, *key])}.safetensors"

    def get(self, path: Path) -> Any | None:
        """The value, or None if it is not there."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as f:
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
                value = from_tensors(json.loads((f.metadata() or {})["value"]), tensors)
            os.utime(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("OFT: %s in the training cache cannot be read and is made again: %s", path.name, error)
            return None
        self.found += 1
        self._used.add(path)
        return value

    def put(self, path: Path, value: Any) -> None:
        """Keep a value: nested lists, tuples and dicts of tensors and plain values."""
        self.made += 1
        self._used.add(path)
        plain, tensors = to_tensors(value)
        try:
            atomically(path, lambda part: save_file(tensors, part, metadata={"value": json.dumps(plain)}))
        except FileError as error:
            log.warning("OFT: the training cache could not be written: %s", error)

    def prune(self) -> int:
        """Delete what was used longest ago until the limit is kept; what this run uses stays. Returns the bytes freed."""
        if not self.folder.is_dir():
            return 0
        for rest in self.folder.glob(f"*{PARTIAL}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - rest.stat().st_mtime > 3600:
                    remove_partial(rest)  # left by a kill
        files = sorted((s.st_mtime, s.st_size, p) for p, s in _files(self.folder, "*.safetensors"))
        total, freed = sum(size for _, size, _ in files), 0
        for _, size, path in files:
            if total - freed <= self.limit:
                break
            if path not in self._used:
                path.unlink(missing_ok=True)
                freed += size
        return freed


def file_hash(path: Path, store: Store, interrupted: Callable[[], object] = lambda: None) -> str:
    """SHA-256 of a file, as 64 hex digits; known again by its path, size and time. interrupted: raises to stop."""
    stat = path.stat()
    place = store.path("file hash", str(path), stat.st_size, stat.st_mtime_ns)
    known = store.get(place)
    if known is None:
        seen = hashlib.sha256()
        with open(path, "rb") as f:
            while part := f.read(1 << 24):
                interrupted()
                seen.update(part)
        known = {"sha256": seen.hexdigest()}
        store.put(place, known)
    return known["sha256"]


@dataclass(frozen=True)
class Past:
    """One folder of an earlier run. finished: its newest state is a completed run's; else it can be gone on with."""

    folder: Path
    finished: bool
    last_used: float
    size: int


def past_runs(root: Path) -> list[Past]:
    """The folders of all runs, newest first. Other folders in `root` are not looked at."""
    out = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not (folder.is_dir() and re.fullmatch(r"[0-9a-f]{24}", folder.name)):
            continue
        files = _files(folder, "**/*")
        complete = {_steps_of(p) for p in folder.glob(RESULT)}
        open_ends = [
            states[0]
            for place in {path.parent for path, _ in files}
            if (states := saved_states(place)) and int(states[0].stem.rpartition("-")[2]) not in complete
        ]
        # A folder without files may be of a run that begins at this moment elsewhere.
        used = max((s.st_mtime for _, s in files), default=time.time())
        finished = bool(complete) and not open_ends
        out.append(Past(folder, finished, used, sum(s.st_size for _, s in files)))
    return sorted(out, key=lambda run: run.last_used, reverse=True)


def _files(folder: Path, pattern: str) -> list[tuple[Path, os.stat_result]]:
    """Files that match, with their sizes and times; not those that another process removes meanwhile."""
    out = []
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                out.append((path, path.stat()))
    return out


def _steps_of(result: Path) -> int | None:
    try:
        return json.loads(result.read_text("utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prune_runs(root: Path, current: Path, keep: int = KEPT_RUNS, days: float = KEPT_DAYS) -> str:
    """Delete finished runs beyond the newest `keep`, and unfinished ones unused for `days`. Returns a sentence, or "".

    A run that can go on and is younger is never deleted, nor is `current`.
    """
    oldest = time.time() - days * 86400
    runs = past_runs(root)
    finished = [run for run in runs if run.finished]
    gone = [*finished[keep:], *(run for run in runs if not run.finished and run.last_used < oldest)]
    freed, count, failed = 0, 0, ""
    for run in gone:
        if run.folder == current:
            continue
        try:
            shutil.rmtree(run.folder)
        except OSError as error:
            failed = f" {run.folder.name} could not be removed: {error}."
            continue
        freed, count = freed + run.size, count + 1
    if not count:
        return failed.strip()
    return f"Removed what {count} earlier runs had kept ({freed / 2**20:.0f} MiB).{failed}"
