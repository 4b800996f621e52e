"""Axes for the web UI's X/Y/Z plot: another file, strength or mode in the prompt's first OFT tag."""

from __future__ import annotations

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


def register() -> None:
    """Add our axes to the plot, once; it is another one after the page was reloaded."""
    grid = next((data.module for data in scripts.scripts_data if _is_grid(data)), None)
    if grid is None or any(option.label.startswith(LABEL) for option in grid.axis_options):
        return
    option = grid.AxisOption
    grid.axis_options += [
        option(f"{LABEL}File", str, _set(_file), grid.format_value, _confirmed(_a_file), 0.5, lambda: [NONE, *_names()]),
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


def _set(change: Callable[[Tag, Any], Tag | None]) -> Callable[[Any, Any, Sequence], None]:
    """What an axis does with a picture to be drawn: the first tag in its prompts is changed."""

    def apply(p: Any, value: Any, values: Sequence) -> None:
        p.prompt = _changed(p.prompt, lambda tag: change(tag, value))
        if getattr(p, "hr_prompt", "") and _FIRST.search(p.hr_prompt):
            p.hr_prompt = _changed(p.hr_prompt, lambda tag: change(tag, value))

    return apply


def _changed(prompt: str, change: Callable[[Tag], Tag | None]) -> str:
    found = _FIRST.search(prompt)
    tag = change(tags.parse(found[1].split(":")) if found else Tag(""))
    text = "" if tag is None else str(tag)
    if found is None:
        if tag is not None and not tag.name:
            raise RuntimeError("The prompt has no <oft:…> tag for this axis to change. Add one, or an axis [OFT] File.")
        return prompt + text
    return prompt[: found.start()] + text + prompt[found.end() :]


def _file(tag: Tag, value: str) -> Tag | None:
    return None if value == NONE else replace(tag, name=value)


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
