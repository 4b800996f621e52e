"""The loader nodes: Load OFT, its model-only form, and its two halves (read a file, apply an adapter)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..oft_core import COFT_CHOICES, MODES, Adapter, ReadOptions, Strength, StrengthError, describe
from ..oft_core.constraint import coft_choice
from . import compat, folders, host, runtime

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
        "strength acts squared; only for repeating old pictures."
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
    "adapter": "The adapter that Load OFT Adapter has read.",
    "out_model": "The model with the rotations applied.",
    "out_clip": "The text encoders with the rotations applied; empty if none were given.",
    "out_report": (
        "What the file is, why it was read so, which layers matched, how far it turns, and warnings."
    ),
    "out_adapter": "The adapter in memory, for Apply OFT and other OFT nodes.",
    "peft_neumann": (
        "Files of PEFT 0.16 to 0.17 and of later versions look alike but use a slightly different series. "
        "auto: decide by the config beside the file."
    ),
    "alpha_rule": (
        "How the stored COFT limit is meant. scaled: times the layer's width (kohya, LyCORIS). raw: as it "
        "is (ComfyUI's own trainer). auto: by key names and metadata."
    ),
    "scaled_divisor": (
        "For 'scaled OFT' files: early fork files divided by another number. auto: decide by the date in "
        "the file."
    ),
    "rotate_bias": (
        "kohya files of 2023 to September 2024 also turned the bias while training. auto: decide by the "
        "date in the file."
    ),
    "boft_conv": (
        "PEFT BOFT files with convolutions: versions before 0.14 read the memory of those weights in "
        "another order. auto: by the keys in the file."
    ),
    "oft_diag": (
        "Old LyCORIS files: whether oft_diag holds the finished rotation or an additive part. auto: "
        "decide by the numbers."
    ),
}


def _model(**more: Any) -> io.Model.Input:
    return io.Model.Input("model", tooltip=TIPS["model"], **more)


def _clip() -> io.Clip.Input:
    return io.Clip.Input("clip", optional=True, tooltip=TIPS["clip"])


def _file() -> io.Combo.Input:
    return io.Combo.Input("oft_name", options=folders.names(), tooltip=TIPS["oft_name"])


def _strength(name: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.01, tooltip=TIPS[name])


def _how() -> list[io.Input]:
    """Mode and limit; optional, so that a graph made without them runs with their defaults."""
    return [
        io.Combo.Input("mode", options=list(MODES), default="rotation", optional=True, tooltip=TIPS["mode"]),
        io.Combo.Input(
            "coft", options=[*COFT_CHOICES, LIMIT], default="file", optional=True, tooltip=TIPS["coft"]
        ),
        compat.entry(
            io.Float.Input,
            "coft_degrees",
            default=15.0,
            min=0.1,
            max=180.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip=TIPS["coft_degrees"],
        ),
        io.Combo.Input(
            "runtime", options=list(runtime.RUNTIMES), default=runtime.AUTO, optional=True, tooltip=TIPS["runtime"]
        ),
    ]


MODEL_OUT = io.Model.Output(display_name="MODEL", tooltip=TIPS["out_model"])
CLIP_OUT = io.Clip.Output(display_name="CLIP", tooltip=TIPS["out_clip"])
REPORT_OUT = io.String.Output(display_name="report", tooltip=TIPS["out_report"])


def _at(value: float, mode: str, coft: str, degrees: float) -> Strength:
    return Strength(float(value), mode, degrees if coft == LIMIT else coft)


def _checked_file(name: str | None) -> bool | str:
    """Input check of a file name; None: it comes over a link and is checked when it is opened."""
    if name is None or folders.find(name):
        return True
    if not folders.names():
        return "No OFT file found. Put safetensors files into models/oft, then press R on the page."
    return f"'{name}' is not in models/oft or the lora folders. Press R on the page to refresh the list."


def _checked_how(mode: str | None, coft: str | None, where: str | None = None) -> bool | str:
    """Input check of mode, coft and runtime; coft may be a number of degrees too, in prompts written by hand."""
    if mode is not None and mode not in MODES:
        return f"mode '{mode}' is not one of {', '.join(MODES)}."
    if where is not None and where not in runtime.RUNTIMES:
        return f"runtime '{where}' is not one of {', '.join(runtime.RUNTIMES)}."
    if coft is None or coft == LIMIT:
        return True
    try:
        coft_choice(coft)
    except StrengthError:
        choices = ", ".join([*COFT_CHOICES, LIMIT])
        return f"coft '{coft}' is not one of {choices}, nor a number of degrees from 0 to 180."
    return True


def _first_complaint(*checks: bool | str) -> bool | str:
    return next((c for c in checks if c is not True), True)


def _shown(applied: host.Applied, *values: Any) -> io.NodeOutput:
    return io.NodeOutput(*values, applied.report, ui=ui.PreviewText(applied.report))


class OFTLoad(io.ComfyNode):
    """Load OFT: one node from file to patched MODEL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_Load",
            display_name="Load OFT",
            category=CATEGORY,
            description=(
                "Loads an OFT, COFT or BOFT file of any common training tool and applies it to a model and "
                "its text encoders."
            ),
            search_aliases=ALIASES,
            inputs=[
                _model(),
                _clip(),
                _file(),
                _strength("strength_model"),
                _strength("strength_clip"),
                *_how(),
            ],
            outputs=[MODEL_OUT, CLIP_OUT, REPORT_OUT],
        )

    @classmethod
    def validate_inputs(
        cls,
        oft_name: str | None = None,
        mode: str | None = None,
        coft: str | None = None,
        runtime: str | None = None,
    ) -> bool | str:
        return _first_complaint(_checked_file(oft_name), _checked_how(mode, coft, runtime))

    @classmethod
    def fingerprint_inputs(cls, oft_name: str | None = None, **_: Any) -> str:
        return folders.fingerprint(oft_name)

    @classmethod
    def execute(
        cls,
        model,
        oft_name,
        strength_model,
        strength_clip,
        clip=None,
        mode="rotation",
        coft="file",
        coft_degrees=15.0,
        runtime="auto",
    ) -> io.NodeOutput:
        at_model, at_clip = (_at(s, mode, coft, coft_degrees) for s in (strength_model, strength_clip))
        applied = host.apply(folders.read(oft_name), model, clip, at_model, at_clip, runtime)
        return _shown(applied, applied.model, applied.clip)


class OFTLoadModelOnly(io.ComfyNode):
    """Load OFT for graphs whose text encoders stay as they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_LoadModelOnly",
            display_name="Load OFT (Model Only)",
            category=CATEGORY,
            description="Loads an OFT file and applies its diffusion model part only.",
            search_aliases=ALIASES,
            inputs=[_model(), _file(), _strength("strength_model"), *_how()],
            outputs=[MODEL_OUT, REPORT_OUT],
        )

    @classmethod
    def validate_inputs(
        cls,
        oft_name: str | None = None,
        mode: str | None = None,
        coft: str | None = None,
        runtime: str | None = None,
    ) -> bool | str:
        return _first_complaint(_checked_file(oft_name), _checked_how(mode, coft, runtime))

    @classmethod
    def fingerprint_inputs(cls, oft_name: str | None = None, **_: Any) -> str:
        return folders.fingerprint(oft_name)

    @classmethod
    def execute(
        cls,
        model,
        oft_name,
        strength_model,
        mode="rotation",
        coft="file",
        coft_degrees=15.0,
        runtime="auto",
    ) -> io.NodeOutput:
        at = _at(strength_model, mode, coft, coft_degrees)
        applied = host.apply(folders.read(oft_name), model, None, at, at, runtime)
        return _shown(applied, applied.model)


class OFTLoadAdapter(io.ComfyNode):
    """Read a file into memory, with a say in what the tensors alone cannot tell."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        options = [
            compat.entry(
                io.Combo.Input,
                name,
                options=list(choices),
                default=choices[0],
                optional=True,
                advanced=True,
                tooltip=TIPS[name],
            )
            for name, choices in ReadOptions.CHOICES.items()
        ]
        return compat.schema(
            node_id="OFT_LoadAdapter",
            display_name="Load OFT Adapter",
            category=CATEGORY,
            description="Reads an OFT file into memory without applying it, for Apply OFT and other nodes.",
            search_aliases=ALIASES,
            inputs=[_file(), *options],
            outputs=[OFTAdapter.Output(display_name="adapter", tooltip=TIPS["out_adapter"]), REPORT_OUT],
        )

    @classmethod
    def validate_inputs(cls, oft_name: str | None = None) -> bool | str:
        return _checked_file(oft_name)

    @classmethod
    def fingerprint_inputs(cls, oft_name: str | None = None, **_: Any) -> str:
        return folders.fingerprint(oft_name)

    @classmethod
    def execute(cls, oft_name, **options: str) -> io.NodeOutput:
        adapter = folders.read(oft_name, ReadOptions(**options))
        text = describe(adapter).to_text()
        return io.NodeOutput(adapter, text, ui=ui.PreviewText(text))


class OFTApply(io.ComfyNode):
    """Apply an adapter that is already in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_Apply",
            display_name="Apply OFT",
            category=CATEGORY,
            description="Applies an OFT adapter from memory to a model, its text encoders, or both.",
            search_aliases=ALIASES,
            inputs=[
                OFTAdapter.Input("adapter", tooltip=TIPS["adapter"]),
                _model(optional=True),
                _clip(),
                _strength("strength_model"),
                _strength("strength_clip"),
                *_how(),
            ],
            outputs=[MODEL_OUT, CLIP_OUT, REPORT_OUT],
        )

    @classmethod
    def validate_inputs(
        cls, mode: str | None = None, coft: str | None = None, runtime: str | None = None
    ) -> bool | str:
        return _checked_how(mode, coft, runtime)

    @classmethod
    def execute(
        cls,
        adapter: Adapter,
        strength_model,
        strength_clip,
        model=None,
        clip=None,
        mode="rotation",
        coft="file",
        coft_degrees=15.0,
        runtime="auto",
    ) -> io.NodeOutput:
        if model is None and clip is None:
            raise ValueError("Apply OFT: connect a MODEL, a CLIP, or both.")
        at_model, at_clip = (_at(s, mode, coft, coft_degrees) for s in (strength_model, strength_clip))
        applied = host.apply(adapter, model, clip, at_model, at_clip, runtime)
        return _shown(applied, applied.model, applied.clip)


NODES = (OFTLoad, OFTLoadModelOnly, OFTLoadAdapter, OFTApply)
