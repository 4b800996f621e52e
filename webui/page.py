"""The page "OFT" among the web UI's extra networks: a card for each file, and what the user wrote about it."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr
from modules import shared, ui_extra_networks, ui_extra_networks_user_metadata
from modules.ui_extra_networks import quote_js

from ..oft_core.errors import printable
from ..oft_core.report import trigger_words
from . import files
from .files import OFTFile

#: The user's own words, in the .json beside the file, under the names that the hosts use for LoRAs.
TRIGGER, WEIGHT, NEGATIVE = "activation text", "preferred weight", "negative text"


class OFTPage(ui_extra_networks.ExtraNetworksPage):
    """Cards of all OFT files in our folders and the LoRA folder."""

    def __init__(self) -> None:
        super().__init__("OFT")
        self.allow_negative_prompt = True

    def refresh(self) -> None:
        files.refresh()

    def create_item(self, name: str, index: int | None = None, enable_filter: bool = True) -> dict[str, Any] | None:
        """What the host shows of one file; None for one that is gone."""
        file = files.get(name)
        if file is None:
            return None
        metadata = dict(file.metadata)
        item = {
            "name": name,
            "filename": file.path,
            "shorthash": file.shorthash,
            "preview": self.find_preview(file.stem) or self.find_embedded_preview(file.stem, name, metadata),
            "description": self.find_description(file.stem),
            # The host puts search terms into the page as they are.
            "search_terms": [html.escape(term) for term in (self.search_terms_from_path(file.path), file.sha256, file.alias)],
            "local_preview": f"{file.stem}.{shared.opts.samples_format}",
            "metadata": metadata,
            "sort_keys": {"default": index, **self.get_sort_keys(file.path)},
        }
        self.read_user_metadata(item)
        user = item["user_metadata"]
        item["prompt"] = _prompt(file, user)
        item["negative_prompt"] = quote_js(str(user.get(NEGATIVE) or ""))
        return item

    def list_items(self) -> Iterator[dict[str, Any]]:
        for index, file in enumerate(files.all_files()):
            if (item := self.create_item(file.name, index)) is not None:
                yield item

    def allowed_directories_for_previews(self) -> list[str]:
        return files.folders()

    def create_user_metadata_editor(self, ui: Any, tabname: str) -> Editor:
        return Editor(ui, tabname, self)


def _prompt(file: OFTFile, user: dict[str, Any]) -> str:
    """What a click puts into the prompt, as JavaScript: the tag, then the trigger words."""
    weight = _number(user.get(WEIGHT))
    strength = f"{weight:g}" if weight else "opts.extra_networks_default_multiplier"
    said = quote_js(f"<oft:{file.name}:") + f" + {strength} + " + quote_js(">")
    words = str(user.get(TRIGGER) or "") or ", ".join(trigger_words(file.metadata, guess=False))
    return said + (" + " + quote_js(" " + words) if words else "")


def _number(value: Any) -> float:
    """A number that the user's file holds, 0 for none."""
    try:
        return float(value or 0)
    except (TypeError, ValueError):
        return 0.0


class Editor(ui_extra_networks_user_metadata.UserMetadataEditor):
    """The host's editor with trigger words, a weight and a negative text."""

    def save(self, name: str, description: str, trigger: str, weight: float, negative: str, notes: str) -> None:
        user = self.get_user_metadata(name)
        user |= {"description": description, TRIGGER: trigger, WEIGHT: weight, NEGATIVE: negative, "notes": notes}
        self.write_user_metadata(name, user)

    def get_metadata_table(self, name: str) -> list[tuple[str, str]]:
        """The host's lines and what the trainer wrote down. The host puts them into the page as they are."""
        table = super().get_metadata_table(name)
        metadata = (self.page.items.get(name) or {}).get("metadata") or {}
        lines = {
            "Output name:": metadata.get("ss_output_name", ""),
            "Base model:": metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture") or "",
            "Trigger words:": ", ".join(trigger_words(metadata)),
            "Network module:": metadata.get("ss_network_module", ""),
        }
        return [*table, *((label, html.escape(printable(value))) for label, value in lines.items() if value)]

    def put_values_into_components(self, name: str) -> list[Any]:
        user = self.get_user_metadata(name)
        values = super().put_values_into_components(name)[:5]
        return [*values, str(user.get(TRIGGER) or ""), _number(user.get(WEIGHT)), str(user.get(NEGATIVE) or "")]

    def create_editor(self) -> None:
        self.create_default_editor_elems()
        trigger = gr.Textbox(label="Activation text", info="Added to the prompt with the tag, in place of the file's own trigger words")
        weight = gr.Slider(label="Preferred weight", info="0: the web UI's default", minimum=0.0, maximum=2.0, step=0.01)
        negative = gr.Textbox(label="Negative prompt", info="Added to the negative prompt")
        self.edit_notes = gr.TextArea(label="Notes", lines=4)
        self.create_default_buttons()
        shown = [
            self.edit_name, self.edit_description, self.html_filedata, self.html_preview, self.edit_notes, trigger, weight, negative,
        ]
        self.button_edit.click(fn=self.put_values_into_components, inputs=[self.edit_name_input], outputs=shown).then(
            fn=lambda: gr.update(visible=True), inputs=[], outputs=[self.box]
        )
        self.setup_save_handler(self.button_save, self.save, [self.edit_description, trigger, weight, negative, self.edit_notes])
