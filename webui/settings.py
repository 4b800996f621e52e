"""The pack's settings, in a section of their own on the web UI's Settings page."""

from __future__ import annotations

import gradio as gr
from modules import shared

from ..oft_core import COFT_CHOICES, MODES, Strength, StrengthError
from .tags import Tag

SECTION = ("oft", "OFT")
#: Name of an option -> its value until the user changes it.
DEFAULTS = {
    "oft_folders": "",
    "oft_mode": "rotation",
    "oft_coft": "file",
    "oft_lora_tags": False,
    "oft_report_below": False,
    "oft_hashes": True,
}


def register() -> None:
    """Put the options on the page; to be called on ``on_ui_settings``."""
    option = shared.OptionInfo

    def add(name: str, label: str, *more, **kwargs):
        made = option(DEFAULTS[name], label, *more, section=SECTION, **kwargs)
        shared.opts.add_option(name, made)
        return made

    add("oft_folders", "More folders with OFT files, one a line", gr.Textbox, {"lines": 2})
    add("oft_mode", "What a strength other than 1 means, where a tag does not say mode=", gr.Radio, {"choices": list(MODES)})
    add("oft_coft", f"COFT limit where a tag does not say coft=: {', '.join(COFT_CHOICES)} or degrees", gr.Textbox)
    add("oft_lora_tags", "<lora:file> reads OFT files too, in place of the web UI's own reader")
    add("oft_report_below", "Show the load report below the picture")
    add("oft_hashes", "Add hashes of OFT files to the picture's parameters")


def get(name: str):
    """An option's value; its default before the host knows it."""
    return getattr(shared.opts, name, DEFAULTS[name])


def more_folders() -> list[str]:
    return [line.strip() for line in str(get("oft_folders")).splitlines() if line.strip()]


def strengths(tag: Tag) -> dict[str, Strength]:
    """A tag's strengths for the parts "model" and "clip".

    Raises StrengthError where the settings hold a limit or mode that does not exist.
    """
    mode = tag.mode or get("oft_mode")
    coft = tag.coft if tag.coft is not None else get("oft_coft")
    try:
        return {"model": Strength(tag.unet, mode, coft), "clip": Strength(tag.te, mode, coft)}
    except StrengthError as error:
        if tag.mode is None or tag.coft is None:
            error.hint = "Look at Settings, OFT."
        raise
