"""Cards of files, as the hosts show them: their own HTML is longer."""

import html
import json
import os

pages: list = []


def register_page(page):
    pages.append(page)


def quote_js(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class ExtraNetworksPage:
    def __init__(self, title):
        self.title, self.name = title, title.lower()
        self.extra_networks_tabname = self.name.replace(" ", "_")
        self.allow_negative_prompt = False
        self.items = {}

    def find_preview(self, path):
        return next((f"./file={path}{end}" for end in (".preview.png", ".png") if os.path.exists(path + end)), None)

    def find_embedded_preview(self, path, name, metadata):
        return None

    def find_description(self, path):
        try:
            with open(path + ".txt", encoding="utf-8") as file:
                return file.read()
        except OSError:
            return None

    def search_terms_from_path(self, path):
        return os.path.basename(path)

    def get_sort_keys(self, path):
        return {"date_modified": int(os.path.getmtime(path)), "name": os.path.basename(path).lower()}

    def read_user_metadata(self, item):
        try:
            with open(os.path.splitext(item["filename"])[0] + ".json", encoding="utf-8") as file:
                item["user_metadata"] = json.load(file)
        except (OSError, ValueError):
            item["user_metadata"] = {}
        item["description"] = item["user_metadata"].get("description", item.get("description"))

    def create_html(self):
        """All cards. As in the hosts, search terms are put in as they are, and the rest is escaped."""
        self.refresh()
        self.items = {item["name"]: item for item in self.list_items()}
        return '<div class="cards">' + "".join(map(self._card, self.items.values())) + "</div>"

    def _card(self, item):
        click = html.escape(f"cardClicked({item['prompt']}, {item['negative_prompt']})")
        image = f'<img class="preview" src="{html.escape(item["preview"])}">' if item["preview"] else ""
        terms = "".join(f'<span class="search" hidden>{term}</span>' for term in item["search_terms"])
        text = html.escape(item["description"] or "")
        return f'<div class="card" onclick="{click}">{image}<b>{html.escape(item["name"])}</b>{terms}<p>{text}</p></div>'
