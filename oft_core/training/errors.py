"""What can go wrong in training, as named errors that a person can act on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import AdapterError, printable


class ConfigError(AdapterError):
    """A setting has a value that is not allowed, contradicts another, or does not fit the model."""


class TrainingError(AdapterError):
    """Training cannot go on (out of memory, numbers that are not finite, a missing package). The last good state is kept."""


class StateError(AdapterError):
    """A saved training state is damaged or belongs to another configuration."""


def raise_faults(faults: Sequence[ConfigError], folder: str | os.PathLike | None = None) -> None:
    """Raise nothing, the one fault, or one ConfigError that names all files of several, as seen from ``folder``."""
    # A file of several pictures is named once.
    faults = list({(fault.file, fault.message): fault for fault in faults}.values())
    if len(faults) < 2:
        for fault in faults:
            raise fault
        return
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        name = fault.file or ""
        if folder is not None and name.startswith(os.path.join(folder, "")):
            name = name[len(os.path.join(folder, "")) :]
        kinds.setdefault(fault.message, []).append(f"{printable(name)} ({printable(fault.found, 100)})")
    hints = dict.fromkeys(fault.hint for fault in faults if fault.hint)
    raise ConfigError(
        f"There are {len(faults)} faults. " + ". ".join(f"{what}: {', '.join(names)}" for what, names in kinds.items()),
        file=folder, hint=" ".join(hints) or None,
    )
