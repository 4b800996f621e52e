"""What the web UI gets from us: a kind of extra network, a script that applies it, and callbacks."""

from __future__ import annotations

from typing import Any

from modules import extra_networks, script_callbacks, scripts, ui_extra_networks

from . import activation, api, infotext, page, settings, tab, tags, xyz


class OFTNetwork(extra_networks.ExtraNetwork):
    """Makes ``<oft:…>`` a tag. Files are applied later, by `OFTScript`, when the LoRAs are in place."""

    def __init__(self) -> None:
        super().__init__(tags.NAME)

    def activate(self, p: Any, params_list: list) -> None:
        """Nothing yet: the order among all tags is known only when all kinds have been activated."""

    def deactivate(self, p: Any) -> None:
        """Nothing: as with LoRAs, the model stays as it is until the next picture says otherwise."""


class OFTScript(scripts.Script):
    """Runs for every picture, without controls of its own."""

    def title(self) -> str:
        return "OFT"

    def show(self, is_img2img: bool) -> object:
        return scripts.AlwaysVisible

    def before_process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        if p.disable_extra_networks:
            activation.clear(p)

    def after_extra_networks_activate(self, p: Any, *args: Any, extra_network_data: dict | None = None, **kwargs: Any) -> None:
        activation.activate(p, extra_network_data or {})


def _before_ui() -> None:
    extra_networks.register_extra_network(OFTNetwork())
    ui_extra_networks.register_page(page.OFTPage())
    xyz.register()


def start() -> None:
    """Register everything; the host forgets it when the page is reloaded, and calls again."""
    script_callbacks.on_before_ui(_before_ui)
    script_callbacks.on_ui_settings(settings.register)
    script_callbacks.on_ui_tabs(tab.build)
    script_callbacks.on_infotext_pasted(infotext.pasted)
    script_callbacks.on_app_started(api.register)
