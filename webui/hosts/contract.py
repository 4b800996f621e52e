"""What the face asks of a web UI, whichever it is; and every name of a web UI that we touch, in one list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...oft_core import Patch, Strength
from ..files import OFTFile
from ..tags import Tag

#: What every web UI has, module -> names. The hosts' own files list theirs as ``TOUCHES``.
COMMON: Mapping[str, tuple[str, ...]] = {
    "modules.cache": ("cached_data_for_file",),
    "modules.call_queue": ("queue_lock", "wrap_gradio_gpu_call"),
    "modules.extra_networks": ("ExtraNetwork", "register_extra_network"),
    "modules.paths": ("models_path",),
    "modules.script_callbacks": (
        "on_app_started", "on_before_ui", "on_infotext_pasted", "on_ui_settings", "on_ui_tabs",
    ),
    "modules.scripts": ("AlwaysVisible", "Script", "scripts_data"),
    "modules.sd_models": ("checkpoints_list", "list_models"),
    "modules.shared": ("OptionInfo", "cmd_opts", "opts", "state"),
    "modules.ui_extra_networks": ("ExtraNetworksPage", "quote_js", "register_page"),
    "modules.ui_extra_networks_user_metadata": ("UserMetadataEditor",),
}


@dataclass(frozen=True)
class Part:
    """One of the two things that a file can patch; see `oft_core.place.Part`."""

    name: str
    words: str
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Wanted:
    """A tag's work on the loaded model.

    identity: text that differs where file, strengths or settings do; starts with `OURS`.
    patches: part name -> (patch, strength), in the file's order.
    after: how many ``<lora:…>`` tags of the prompt stand before this one, by name.
    instead: whether the tag is a ``<lora:…>`` one, whose own LoRA, if the host has made one of it, is to be taken out.
    """

    tag: Tag
    file: OFTFile
    identity: str
    patches: Mapping[str, Sequence[tuple[Patch, Strength]]]
    after: tuple[str, ...] = ()
    instead: bool = False


@dataclass(frozen=True)
class Trainee:
    """A loaded model as training wants it. All tensors of calls are on `device`, float32 unless said.

    kind: SD15, SD20 or SDXL.   net: the diffusion model.   prefix: what stands before its parameters' names in `Part.shapes`.
    prediction: eps or v.   alphas_cumprod: (steps,).   file: of the checkpoint, None if unknown.   digest: tells models apart.
    call: (x (n, 4, h, w), timesteps (n,), conditioning with n rows) -> the network's output.
    text: (prompt, width, height) -> conditioning: ``crossattn`` (1, tokens, width) and for SDXL ``vector`` (1, width).
    encode: picture (1, 3, h, w) in 0..1 -> latent as the network reads it.   decode: the other way.
    ready: a context in which the network has no patches, and its code has a backward pass.   load: puts it on the device, also again
    after text encoders or VAE have taken its place.
    """

    kind: str
    net: nn.Module
    prefix: str
    prediction: str
    alphas_cumprod: Tensor
    device: torch.device
    file: str | None
    call: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    text: Callable[[str, int, int], dict[str, Tensor]]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    ready: Callable[[], AbstractContextManager]
    load: Callable[[], object]


#: How everything that we hang on a host's model is called.
OURS = "oft:"


class Host(Protocol):
    """One web UI."""

    #: Its name for people.
    title: str

    def parts(self, sd_model: Any) -> list[Part]:
        """The diffusion model ("model") and the text encoders ("clip") of a loaded model."""

    def put(self, sd_model: Any, wanted: Sequence[Wanted]) -> list[str]:
        """Have the model turned by exactly these from now on, in order; [] takes everything of ours away.

        What is wanted already stays as it is. Returns lines for the user about what this host cannot do.
        """

    def chosen(self) -> Any:
        """The model that the user has chosen, loaded now if it was not."""

    def trainee(self, sd_model: Any) -> Trainee:
        """The loaded model for training. Raises ConfigError for models and settings that cannot be trained here."""
