"""What the face asks of a web UI, whichever it is; and every name of a web UI that we touch, in one list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...oft_core import Patch, Strength
from ..files import OFTFile
from ..tags import Tag

#: What every web UI has, module -> names. The hosts' own files list theirs as ``TOUCHES``.
COMMON: Mapping[str, tuple[str, ...]] = {
    "modules.cache": ("cached_data_for_file",),
    "modules.call_queue": ("wrap_gradio_gpu_call",),
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
