"""Names that files may have on every system, and what a file says of itself."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .errors import ConfigError

# Metadata of a file that a training wrote: which run's it is.
RUN = "oft_run"

# Windows' own: characters that no name has, and names that are devices, whatever follows their first dot.
_NO_CHARACTER = re.compile(r'[<>:"|?*\x00-\x1f]')
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *(?:\.|$)", re.IGNORECASE)
# File systems have 255 bytes for a name; the number, the ending and the name of an unfinished file come on top.
_LONGEST = 190


def portable(name: str) -> str:
    """A name for files with / between its parts. Raises ConfigError where it is a path, or no name, on some system.

    A backslash separates parts on Windows, and elsewhere makes names that nobody means.
    """
    if not name.strip(" ./\\"):
        # The host would make a hidden file of it.
        raise ConfigError("A file cannot be saved without a name", found=repr(name), expected="such as training/subject")
    slashed = name.replace("\\", "/")
    for part in slashed.split("/"):
        if (why := _unsuitable(part)) is not None:
            raise ConfigError(
                "A file cannot be saved under this name", found=f"{name!r}: {why}", expected="such as training/subject",
                hint="Choose a name that every system can have; folders are separated by /.",
            )
    return slashed


def _unsuitable(part: str) -> str | None:
    """What is wrong with one part of a name, in words."""
    if part == "..":
        return "'..' leads out of its folder"
    if found := _NO_CHARACTER.search(part):
        return f"the character {found[0]!r}"
    if _DEVICE.match(part):
        return f"{part!r} is a device on Windows"
    if part != "." and part.endswith((".", " ")):
        return f"{part!r} ends with a dot or a space"
    if len(part.encode("utf-8", "surrogatepass")) > _LONGEST:
        return f"a part of more than {_LONGEST} bytes"
    return None


def inside(path: str | os.PathLike, root: str | os.PathLike) -> str | None:
    """The path as seen from the folder `root`, or None if it leads elsewhere."""
    try:
        name = os.path.relpath(os.path.abspath(path), os.path.abspath(root))
    except ValueError:  # another drive, on Windows
        return None
    return None if name.split(os.sep)[0] == os.pardir else name


def header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty if there is no such file or it cannot be read."""
    try:
        with safe_open(path, "pt") as f:
            return dict(f.metadata() or {})
    except (SafetensorError, OSError):
        return {}
