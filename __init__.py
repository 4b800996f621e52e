"""OFT pack: Orthogonal Fine-Tuning adapters for ComfyUI.

This file is ComfyUI's door only. Importing it does nothing: the node modules, and with them ComfyUI's own
modules, are imported when ComfyUI calls `comfy_entrypoint`. That keeps the folder harmless where it lies
inside a web UI's extension folder or is collected by a test runner.
"""

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint():
    """The extension object that lists this pack's nodes."""
    from .nodes.extension import OFTExtension

    return OFTExtension()
