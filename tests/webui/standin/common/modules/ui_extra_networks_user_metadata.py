"""The hosts' editor of what a user writes about a file."""

import json
import os

import gradio as gr


class UserMetadataEditor:
    def __init__(self, ui, tabname, page):
        self.ui, self.tabname, self.page = ui, tabname, page
        self.id_part = f"{tabname}_{page.extra_networks_tabname}_edit_user_metadata"

    def get_user_metadata(self, name):
        return self.page.items[name].setdefault("user_metadata", {})

    def create_default_editor_elems(self):
        self.edit_name = gr.HTML(elem_classes="extra-network-name")
        self.edit_description = gr.Textbox(label="Description", lines=2)
        self.html_filedata, self.html_preview = gr.HTML(), gr.HTML()

    def create_default_buttons(self):
        self.button_save = gr.Button("Save", elem_id=f"{self.id_part}_save")

    def get_metadata_table(self, name):
        return [("Filename: ", os.path.basename(self.page.items[name]["filename"]))]

    def put_values_into_components(self, name):
        user = self.get_user_metadata(name)
        rows = "".join(f"<tr><th>{label}</th><td>{value}</td></tr>" for label, value in self.get_metadata_table(name))
        return name, user.get("description", ""), f"<table>{rows}</table>", "", user.get("notes", "")

    def write_user_metadata(self, name, metadata):
        path = os.path.splitext(self.page.items[name]["filename"])[0] + ".json"
        with open(path, "w", encoding="utf-8") as file:
            json.dump(metadata, file)

    def setup_save_handler(self, button, func, components):
        button.click(fn=func, inputs=[self.edit_name_input, *components], outputs=[])

    def create_ui(self):
        with gr.Column(visible=False, elem_id=self.id_part) as self.box:
            self.edit_name_input = gr.Textbox(label="Card", elem_id=f"{self.id_part}_name")
        self.button_edit = gr.Button("Edit", elem_id=f"{self.id_part}_button")
        self.create_editor()
