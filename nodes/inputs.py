"""Inputs and outputs that several nodes share: how they look, how they are checked, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..oft_core import COFT_CHOICES, MODES, FileError, Strength, StrengthError
from ..oft_core.constraint import coft_choice
from . import compat
from .binding import folders
from .binding.plan import AUTO, RUNTIMES

CATEGORY = "OFT"
ALIASES = ["oft", "boft", "lora", "lycoris", "dreambooth", "orthogonal finetuning", "adapter"]
LIMIT = "limit"
OFTAdapter = io.Custom("OFT_ADAPTER")

TIPS = {
    "model": (
        "The diffusion model that the file is applied to. The model itself is not changed: the node "
        "passes on a patched copy."
    ),
    "clip": "The text encoders. Needed only if the file has layers for them; may be left unconnected.",
    "oft_name": (
        "The OFT file: safetensors files in models/oft and in the lora folders, extra paths included."
    ),
    "strength_model": (
        "How strongly the diffusion model is turned. 1 is the file exactly, 0 the base model exactly; in "
        "the two rotation modes -1 undoes 1."
    ),
    "strength_clip": (
        "How strongly the text encoders are turned. 1 is the file exactly, 0 the base text encoders exactly."
    ),
    "mode": (
        "What a strength other than 1 means. rotation: the generator is scaled, every strength is a true "
        "rotation. geodesic: equal steps of strength are equal angles. linear: a straight mix of base and "
        "result, as kohya, LyCORIS and A1111 do. core: reproduces ComfyUI's own LoRA loader, whose "
        "strength acts squared (BOFT: on every stage); only for repeating old pictures."
    ),
    "coft": (
        "The limit on how far the file may turn (constrained OFT). file: as the trainer applied it, then "
        "the strength. hold: the file's limit also holds above strength 1. off: no limit. limit: in "
        "addition no block turns further than coft_degrees."
    ),
    "coft_degrees": (
        "The largest angle in degrees that any block may turn by after strength. Used only when coft is "
        "'limit'."
    ),
    "runtime": (
        "Where the rotation is applied. weights: to the model's weights, which can be saved. activations: to "
        "what goes into each layer and comes out of it; weights stay as they are stored. auto: activations "
        "where the weights are quantised (GGUF, fp8, int8 and so on), weights elsewhere."
    ),
    "out_model": "The model with the rotations applied.",
    "out_clip": "The text encoders with the rotations applied; empty if none were given.",
    "out_trigger": (
        "The trigger words that the trainer wrote into the file, with commas between them; empty if it wrote none."
    ),
    "out_report": (
        "What the file is, why it was read so, which layers matched, how far it turns, and warnings."
    ),
}
_entry = compat.explained(TIPS)

MODEL_OUT = io.Model.Output(display_name="MODEL", tooltip=TIPS["out_model"])
CLIP_OUT = io.Clip.Output(display_name="CLIP", tooltip=TIPS["out_clip"])
TRIGGER_OUT = io.String.Output(display_name="trigger", tooltip=TIPS["out_trigger"])
REPORT_OUT = io.String.Output(display_name="report", tooltip=TIPS["out_report"])


def model(**more: Any) -> io.Model.Input:
    return _entry(io.Model.Input, "model", **more)


def clip() -> io.Clip.Input:
    return _entry(io.Clip.Input, "clip", optional=True)


def file() -> io.Combo.Input:
    return _entry(io.Combo.Input, "oft_name", options=folders.names())


def strength(name: str, tooltip: str | None = None, **more: Any) -> io.Float.Input:
    """A strength. tooltip: that of `TIPS` under its name if None."""
    tooltip = tooltip or TIPS[name]
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.01, tooltip=tooltip, **more)


def how() -> list[io.Input]:
    """Mode and limit; optional, so that a graph made without them runs with the defaults of `How`."""
    return [
        _entry(io.Combo.Input, "mode", options=list(MODES), default=How.mode, optional=True),
        _entry(io.Combo.Input, "coft", options=[*COFT_CHOICES, LIMIT], default=How.coft, optional=True),
        _entry(
            io.Float.Input,
            "coft_degrees",
            default=How.coft_degrees,
            min=0.1,
            max=180.0,
            step=0.1,
            optional=True,
            advanced=True,
        ),
    ]


def where() -> io.Combo.Input:
    """Weights or activations; optional as those of `how` are."""
    return _entry(
        io.Combo.Input, "runtime", options=list(RUNTIMES), default=How.runtime, optional=True
    )


@dataclass(frozen=True)
class How:
    """What a node was given at the inputs of `how` and `where`. coft: also a number of degrees."""

    mode: str = "rotation"
    coft: str | float = "file"
    coft_degrees: float = 15.0
    runtime: str = AUTO

    def at(self, value: float) -> Strength:
        """A strength with this mode and limit. Raises StrengthError for an unknown one."""
        return Strength(float(value), self.mode, self.coft_degrees if self.coft == LIMIT else self.coft)


# --- checks before a graph runs: True, or what is wrong -----------------------------------------------------


def checked_file(name: str | None) -> bool | str:
    """A file name; None: it comes over a link and is checked when it is opened.

    Names that only mean a listed file pass, so a node that checks its files here must have the host leave the combo's
    list to it, by taking the input's name in `validate_inputs`.
    """
    if name is None:
        return True
    if not isinstance(name, str):
        return f"The name of an OFT file is a text, not {name!r}."
    if not folders.names():
        return "No OFT file found. Put safetensors files into models/oft, then press R on the page."
    try:
        folders.locate(name)
    except FileError as error:
        return str(error)
    return True


def checked_how(mode: str | None, coft: str | None, way: str | None = None) -> bool | str:
    """Mode, coft and runtime; coft may be a number of degrees too, in prompts written by hand."""
    if mode is not None and mode not in MODES:
        return f"mode '{mode}' is not one of {', '.join(MODES)}."
    if way is not None and way not in RUNTIMES:
        return f"runtime '{way}' is not one of {', '.join(RUNTIMES)}."
    if coft is None or coft == LIMIT:
        return True
    try:
        coft_choice(coft)
    except StrengthError:
        choices = ", ".join([*COFT_CHOICES, LIMIT])
        return f"coft '{coft}' is not one of {choices}, nor a number of degrees from 0 to 180."
    return True
