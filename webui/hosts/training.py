"""What the web UIs that can train share: kinds of models, and code of theirs that has no backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...oft_core.training import ConfigError

EXPECTED = "a loaded SD 1.x, SD 2.x or SDXL model"


def kind_of(sd_model: Any) -> str:
    """SD15, SD20 or SDXL. Raises ConfigError for others."""
    if sd_model is None:
        raise ConfigError("There is no model to train", found="no checkpoint is loaded", expected=EXPECTED)
    for kind, flag in (("SDXL", "is_sdxl"), ("SD20", "is_sd2"), ("SD15", "is_sd1")):
        if getattr(sd_model, flag, False):
            return kind
    raise ConfigError(
        "This kind of model cannot be trained in a web UI", found=type(sd_model).__name__, expected=EXPECTED,
        hint="In ComfyUI the node Train OFT trains all kinds.",
    )


def check_input(channels: int) -> None:
    """Raises ConfigError for models that read more than a latent (inpainting, editing)."""
    if channels != 4:
        raise ConfigError(
            "This model draws from a picture", found=f"an input layer for {channels} channels", expected="4, as models that draw from text",
            hint="Load the model that it was made from.",
        )


def not_here(title: str) -> ConfigError:
    """For the web UIs in which training was not tried."""
    return ConfigError(
        f"{title} cannot train yet", found=title, expected="Automatic1111 or Forge", hint="In ComfyUI the node Train OFT trains all kinds."
    )


def file_of(sd_model: Any) -> str | None:
    return getattr(getattr(sd_model, "sd_checkpoint_info", None), "filename", None)


@contextlib.contextmanager
def own_checkpoints_off(net: nn.Module) -> Iterator[None]:
    """The models' own way of computing blocks twice knows only parameters of theirs, which are frozen; ours is used."""
    before = [(m, name, m.__dict__[name]) for m in net.modules() for name in ("checkpoint", "use_checkpoint") if name in m.__dict__]
    before = [(m, name, value) for m, name, value in before if isinstance(value, bool)]
    try:
        for m, name, _ in before:
            m.__dict__[name] = False
        yield
    finally:
        for m, name, value in before:
            m.__dict__[name] = value
