"""The state of a run on disk: safetensors with the plain values as JSON in the header (no pickle), written so that no moment of a
kill or power cut leaves less than the last good state."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import atomically, remove_partials
from ..errors import FileError
from .errors import StateError

_NAME = re.compile(r"state-(\d{8})\.safetensors")
_FORMAT = "oft training state 1"


def save_state(folder: Path, step: int, state: Mapping[str, object], fingerprint: Mapping[str, object], keep: int = 2) -> Path:
    """Write ``state`` (nested dicts, lists, tuples, tensors, plain values) as the state after ``step`` steps; keep the last ``keep``.

    Raises StateError if the disk does not take it; earlier states stay.
    """
    plain, tensors = to_tensors(state)
    header = {"format": _FORMAT, "step": str(step), "state": json.dumps(plain), "fingerprint": json.dumps(dict(fingerprint))}
    final = folder / f"state-{step:08d}.safetensors"
    try:
        atomically(final, lambda part: save_file(tensors, part, metadata=header))
        _sync_folder(folder)
    except (OSError, FileError) as error:
        raise StateError(
            "The training state could not be written", file=final, found=getattr(error, "found", None) or str(error),
            hint="Free some disk space and start again; it goes on from the last state that was written.",
        ) from error
    # States of later steps are not of this run (or damaged, else it had gone on from them): they are not what is kept.
    for old in [p for p in saved_states(folder) if p.name <= final.name][keep:]:
        old.unlink(missing_ok=True)
    remove_partials(folder, "state-")  # left by a run that was killed while it wrote
    return final


def saved_states(folder: Path) -> list[Path]:
    """Complete state files in the folder, newest step first."""
    return sorted((p for p in folder.glob("state-*.safetensors") if _NAME.fullmatch(p.name)), reverse=True)


def load_latest(folder: Path, fingerprint: Mapping[str, object] | None = None) -> tuple[int, dict] | None:
    """(steps done, state) of the newest readable state, or None if the folder holds none.

    Raises StateError if that state belongs to another configuration (naming what differs), or if all states are damaged.
    """
    damaged: list[str] = []
    for path in saved_states(folder):
        try:
            return load_state(path, fingerprint)
        except _Damaged as error:
            damaged.append(str(error))
    if damaged:
        raise StateError("No saved state can be read", file=folder, found="; ".join(damaged), hint="Switch resume off to start anew.")
    return None


def load_state(path: Path, fingerprint: Mapping[str, object] | None = None) -> tuple[int, dict]:
    """(steps done, state) of one file. Raises StateError: damaged, or of another configuration (the differing fields are named)."""
    try:
        with safe_open(path, "pt") as f:
            header = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
        if header.get("format") != _FORMAT:
            raise StateError("This file is not a training state", file=path, expected=_FORMAT, found=header.get("format"))
        plain, theirs = json.loads(header["state"]), json.loads(header["fingerprint"])
        step = int(header["step"])
        state = from_tensors(plain, tensors)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _Damaged("The training state is damaged", file=path, found=str(error)) from error
    if fingerprint is not None:
        check_fingerprint(theirs, json.loads(json.dumps(dict(fingerprint))), path)
    return step, state


def check_fingerprint(saved: Mapping[str, object], wanted: Mapping[str, object], path: Path) -> None:
    """Raises StateError naming every field in which the two differ."""
    absent = object()
    names = [n for n in sorted(saved.keys() | wanted.keys()) if saved.get(n, absent) != wanted.get(n, absent)]
    if names:
        def show(source: Mapping[str, object]) -> str:
            return ", ".join(f"{n} = {json.dumps(source[n]) if n in source else 'absent'}" for n in names)

        raise StateError(
            "The saved state belongs to other settings, so it cannot be continued", file=path,
            found=show(saved), expected=show(wanted),
            hint="Use the settings of the saved run, or switch resume off to start anew.",
        )


class _Damaged(StateError):
    """A state file that cannot be read."""


def to_tensors(value: object) -> tuple[object, dict[str, Tensor]]:
    """Nested dicts, lists, tuples, tensors and plain values -> (JSON-ready value that names the tensors, the tensors on the CPU).

    Raises TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(value, "", tensors), tensors


def from_tensors(plain: object, tensors: Mapping[str, Tensor]) -> object:
    """The value of which ``to_tensors`` made this. Raises KeyError or ValueError if it does not fit together."""
    return _decode(plain, tensors)


def _encode(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, Tensor):
        key = name or "value"
        while key in tensors:
            key += "'"
        # Tensors of one storage would be refused; every one is stored by itself.
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": [[k, _encode(v, f"{name}.{k}" if name else str(k), tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a training state cannot hold {type(value).__name__}")


def _decode(value: object, tensors: Mapping[str, Tensor]) -> object:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _decode(v, tensors) for k, v in content}
    items = [_decode(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where the system can (Windows cannot open folders)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(value: object) -> str:
    """Short hash of a plain value, for fingerprints of long lists."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
