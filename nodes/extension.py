"""The extension object that lists this pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension

from . import blocks, dataset, inspector, load, save, schedule, stack, train
from .binding import everywhere, folders


class OFTExtension(ComfyExtension):
    """All nodes, in the order of the menu."""

    def __init__(self) -> None:
        """Registers the `oft` model folder; not in `on_load`, which older hosts do not call."""
        folders.register()
        everywhere.start()

    async def get_node_list(self) -> list:
        modules = (load, stack, blocks, schedule, dataset, train, save, inspector)
        return [node for module in modules for node in module.NODES]
