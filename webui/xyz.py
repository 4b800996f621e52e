"""Axes for the web UI's X/Y/Z plot: another file, strength or mode in the prompt's first OFT tag."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from modules import scripts

from ..oft_core import MODES, AdapterError
from . import files, tags
from .tags import Tag

LABEL = "[OFT] "
NONE = "None"
_FIRST = re.compile(r"<oft:([^>]+)>")
_IDLE = "An [OFT] axis changed nothing: the prompt has no <oft:…> tag, and no axis chooses a file."


def register() -> None:
    """Add our axes to the plot, once; it is another one after the page was reloaded."""
    grid = next((data.module for data in scripts.scripts_data if _is_grid(data)), None)
    if grid is None or any(option.label.startswith(LABEL) for option in grid.axis_options):
        return
    option = grid.AxisOption
    grid.axis_options += [
        option(f"{LABEL}File", str, _file, grid.format_value, _confirmed(_a_file), 0.5, lambda: [NONE, *_names()]),
        option(f"{LABEL}Strength", float, _set(lambda tag, value: replace(tag, te=value, unet=value)), grid.format_value_add_label),
        option(
            f"{LABEL}Mode", str, _set(lambda tag, value: replace(tag, mode=value)), grid.format_value, _confirmed(_a_mode), 0.0,
            lambda: list(MODES),
        ),
    ]


def _is_grid(data: Any) -> bool:
    return str(data.path).replace("\\", "/").rpartition("/")[2] == "xyz_grid.py" and hasattr(data.module, "axis_options")


def _names() -> list[str]:
    return [file.name for file in files.all_files()]


def _set(change: Callable[[Tag, Any], Tag]) -> Callable[[Any, Any, Sequence], None]:
    """What an axis does with a picture to be drawn: the first tag in its prompts is changed.

    Where there is none, because the plot's File is None or is chosen by an axis that comes later, the change waits.
    """

    def apply(p: Any, value: Any, values: Sequence) -> None:
        if not _FIRST.search(p.prompt):
            p.oft_waiting = [*getattr(p, "oft_waiting", ()), lambda tag: change(tag, value)]
            if not getattr(p, "oft_no_file", False):
                p.comment(_IDLE)
        _rewrite(p, lambda tag: change(tag, value))

    return apply


def _file(p: Any, value: str, values: Sequence) -> None:
    """The File axis: another name in the first tag, or no tag, or a tag where there was none."""
    waiting = getattr(p, "oft_waiting", ())
    p.oft_waiting, p.oft_no_file = [], value == NONE
    p.comments.pop(_IDLE, None)
    if value != NONE and not _FIRST.search(p.prompt):
        p.prompt += str(functools.reduce(lambda tag, change: change(tag), waiting, Tag(value)))
        return
    _rewrite(p, lambda tag: None if value == NONE else replace(tag, name=value))


def _rewrite(p: Any, change: Callable[[Tag], Tag | None]) -> None:
    def changed(found: re.Match[str]) -> str:
        tag = change(tags.parse(found[1].split(":")))
        return "" if tag is None else str(tag)

    p.prompt = _FIRST.sub(changed, p.prompt, count=1)
    if getattr(p, "hr_prompt", ""):
        p.hr_prompt = _FIRST.sub(changed, p.hr_prompt, count=1)


def _confirmed(check: Callable[[str], None]) -> Callable[[Any, Sequence[str]], None]:
    """A check of an axis' values before anything is drawn; the host shows a RuntimeError."""

    def confirm(p: Any, values: Sequence[str]) -> None:
        for value in values:
            try:
                check(value)
            except AdapterError as error:
                raise RuntimeError(str(error)) from error

    return confirm


def _a_file(value: str) -> None:
    if value != NONE:
        files.find(value)


def _a_mode(value: str) -> None:
    tags.parse(["x", f"mode={value}"])
