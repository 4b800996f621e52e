"""Which files made a picture, in its parameters; and their names again when parameters are pasted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from . import files, settings
from .hosts.contract import Wanted

HASHES, IDLE = "OFT hashes", "OFT not applied"

_TAG = re.compile(r"<oft:([^:>]+)")
_NOT_IN_LISTS = str.maketrans("", "", ":,")


def write(p: Any, wanted: Sequence[Wanted], idle: Sequence[str]) -> None:
    """Put the files' hashes, and the tags that did nothing, among a picture's parameters; passes add to each other."""
    if getattr(p, "oft_hashes", None) is None or not getattr(p, "is_hr_pass", False):
        p.oft_hashes, p.oft_idle = {}, {}
    p.oft_idle |= dict.fromkeys(tag.translate(str.maketrans("", "", ",\"\n")) for tag in idle)
    if settings.get("oft_hashes"):
        p.oft_hashes |= {one.file.name.translate(_NOT_IN_LISTS): one.file.shorthash for one in wanted}
    for label, value in (
        (HASHES, ", ".join(f"{name}: {found}" for name, found in p.oft_hashes.items())),
        (IDLE, " ".join(p.oft_idle)),
    ):
        if value:
            p.extra_generation_params[label] = value
        else:
            p.extra_generation_params.pop(label, None)


def pasted(infotext: str, params: dict[str, Any]) -> None:
    """Give the prompt the names that the files have here. The host calls it for pasted parameters."""
    given = str(params.get(HASHES) or "")
    hashes = dict(pair for item in given.split(",") if len(pair := [part.strip() for part in item.rsplit(":", 1)]) == 2)

    def renamed(match: re.Match[str]) -> str:
        file = files.by_hash(hashes.get(match[1].translate(_NOT_IN_LISTS).strip(), ""))
        return match[0] if file is None else f"<oft:{file.name}"

    for field in ("Prompt", "Hires prompt"):
        if hashes and params.get(field):
            params[field] = _TAG.sub(renamed, params[field])
