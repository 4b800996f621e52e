"""The web UIs, told apart by what they have."""

from __future__ import annotations

import functools
import importlib.util

from .contract import Host


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.lru_cache(maxsize=1)
def current() -> Host:
    """The web UI that we run in. Raises ImportError where it is none that we know."""
    if _has("modules_forge.packages.comfy.weight_adapter"):
        from . import neo

        return neo.Neo()
    if _has("backend.patcher.lora"):
        from . import forge

        return forge.Forge()
    if _has("ldm_patched.modules.weight_adapter"):
        from . import reforge

        return reforge.ReForge()
    if _has("networks") and _has("network"):
        from . import a1111

        return a1111.A1111()
    raise ImportError(
        "The OFT pack knows Automatic1111, Forge, Forge Neo and reForge; this web UI has the LoRA engine of none of them."
    )
