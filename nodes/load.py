"""The loader nodes: Load OFT, its model-only form, and its two halves (read a file, apply an adapter)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui

from ..oft_core import Adapter, ReadOptions, describe
from ..oft_core.report import trigger_words
from . import compat, inputs
from .binding import folders
from .binding.apply import apply

TIPS = {
    "adapter": "The adapter that Load OFT Adapter has read.",
    "out_adapter": "The adapter in memory, for Apply OFT and other OFT nodes.",
    "peft_neumann": (
        "How PEFT's oft_R files build their rotations: old (0.16 to 0.17), new (later), exact (trained with "
        "use_cayley_neumann=False). auto: decide by the config beside the file."
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
    "oft_writer": (
        "oft_R files whose names say nothing of their writer: PEFT and OneTrainer turn convolutions in "
        "opposite directions. auto: by key names, a config beside the file and metadata."
    ),
    "peft_base": (
        "Saved states of a whole PEFT model hold the base model's weights too. ignore: leave them out. apply: "
        "put them in place of the model's. auto: only biases that the config calls trained."
    ),
    "peft_terms": (
        "Terms of PEFT's series (num_cayley_neumann_terms). 0: as the config beside the file says, without "
        "one 5."
    ),
    "peft_coft": (
        "PEFT's COFT limit (eps, with coft=True). 0: as the config beside the file says, without one no "
        "limit."
    ),
    "adapter_name": (
        "Which one to read where a file holds several PEFT adapters. Empty: the only one."
    ),
}


def _shown(report: str, *values: Any, name: str | None = None, trigger: Sequence[str] | None = None) -> io.NodeOutput:
    """The outputs and the report; name: of the file, as the graph has it; trigger: one more output."""
    said = None if name is None else folders.other_name(name)
    report = report if said is None else f"{report}\n{said}"
    more = () if trigger is None else (", ".join(trigger),)
    return io.NodeOutput(*values, report, *more, ui=ui.PreviewText(report))


def _trigger(adapter: Adapter) -> list[str]:
    """What goes into a prompt: the words that the trainer named, not the commonest ones of the captions."""
    return trigger_words(adapter.metadata, guess=False)


class _Checked(io.ComfyNode):
    """What these nodes check before a graph runs, and when a file has changed."""

    @classmethod
    def validate_inputs(
        cls,
        oft_name: str | None = None,
        mode: str | None = None,
        coft: str | None = None,
        runtime: str | None = None,
    ) -> bool | str:
        checks = inputs.checked_file(oft_name), inputs.checked_how(mode, coft, runtime)
        return next((c for c in checks if c is not True), True)

    @classmethod
    def fingerprint_inputs(cls, oft_name: str | None = None, **_: Any) -> str:
        return folders.fingerprint(oft_name)


class OFTLoad(_Checked):
    """Load OFT: one node from file to patched MODEL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_Load",
            display_name="Load OFT",
            category=inputs.CATEGORY,
            description=(
                "Loads an OFT, COFT or BOFT file of any common training tool and applies it to a model and "
                "its text encoders."
            ),
            search_aliases=inputs.ALIASES,
            inputs=[
                inputs.model(),
                inputs.clip(),
                inputs.file(),
                inputs.strength("strength_model"),
                inputs.strength("strength_clip"),
                *inputs.how(),
                inputs.where(),
            ],
            outputs=[inputs.MODEL_OUT, inputs.CLIP_OUT, inputs.REPORT_OUT, inputs.TRIGGER_OUT],
        )

    @classmethod
    def execute(cls, model, oft_name, strength_model, strength_clip, clip=None, **how) -> io.NodeOutput:
        how = inputs.How(**how)
        at_model, at_clip = how.at(strength_model), how.at(strength_clip)
        adapter = folders.read(oft_name)
        applied = apply(adapter, model, clip, at_model, at_clip, how.runtime)
        return _shown(applied.report, applied.model, applied.clip, name=oft_name, trigger=_trigger(adapter))


class OFTLoadModelOnly(_Checked):
    """Load OFT for graphs whose text encoders stay as they are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_LoadModelOnly",
            display_name="Load OFT (Model Only)",
            category=inputs.CATEGORY,
            description="Loads an OFT file and applies its diffusion model part only.",
            search_aliases=inputs.ALIASES,
            inputs=[
                inputs.model(),
                inputs.file(),
                inputs.strength("strength_model"),
                *inputs.how(),
                inputs.where(),
            ],
            outputs=[inputs.MODEL_OUT, inputs.REPORT_OUT, inputs.TRIGGER_OUT],
        )

    @classmethod
    def execute(cls, model, oft_name, strength_model, **how) -> io.NodeOutput:
        how = inputs.How(**how)
        at = how.at(strength_model)
        adapter = folders.read(oft_name)
        applied = apply(adapter, model, None, at, at, how.runtime)
        return _shown(applied.report, applied.model, name=oft_name, trigger=_trigger(adapter))


class OFTLoadAdapter(_Checked):
    """Read a file into memory, with a say in what the tensors alone cannot tell."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        choice = functools.partial(compat.explained(TIPS), io.Combo.Input, optional=True, advanced=True)
        options = [
            choice(name, options=list(choices), default=choices[0])
            for name, choices in ReadOptions.CHOICES.items()
        ]
        entry = functools.partial(compat.explained(TIPS), optional=True, advanced=True)
        options += [
            entry(io.Int.Input, "peft_terms", default=0, min=0, max=1000),
            entry(io.Float.Input, "peft_coft", default=0.0, min=0.0, max=1000.0, step=1e-6, round=False),
            entry(io.String.Input, "adapter_name", default=""),
        ]
        return compat.schema(
            node_id="OFT_LoadAdapter",
            display_name="Load OFT Adapter",
            category=inputs.CATEGORY,
            description="Reads an OFT file into memory without applying it, for Apply OFT and other nodes.",
            search_aliases=inputs.ALIASES,
            inputs=[inputs.file(), *options],
            outputs=[
                inputs.OFTAdapter.Output(display_name="adapter", tooltip=TIPS["out_adapter"]),
                inputs.REPORT_OUT,
                inputs.TRIGGER_OUT,
            ],
        )

    @classmethod
    def execute(cls, oft_name, **options: Any) -> io.NodeOutput:
        adapter = folders.read(oft_name, ReadOptions(**options))
        return _shown(describe(adapter).to_text(), adapter, name=oft_name, trigger=_trigger(adapter))


class OFTApply(_Checked):
    """Apply an adapter that is already in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_Apply",
            display_name="Apply OFT",
            category=inputs.CATEGORY,
            description="Applies an OFT adapter from memory to a model, its text encoders, or both.",
            search_aliases=inputs.ALIASES,
            inputs=[
                inputs.OFTAdapter.Input("adapter", tooltip=TIPS["adapter"]),
                inputs.model(optional=True),
                inputs.clip(),
                inputs.strength("strength_model"),
                inputs.strength("strength_clip"),
                *inputs.how(),
                inputs.where(),
            ],
            outputs=[inputs.MODEL_OUT, inputs.CLIP_OUT, inputs.REPORT_OUT],
        )

    @classmethod
    def execute(
        cls, adapter: Adapter, strength_model, strength_clip, model=None, clip=None, **how
    ) -> io.NodeOutput:
        if model is None and clip is None:
            raise ValueError("Apply OFT: connect a MODEL, a CLIP, or both.")
        how = inputs.How(**how)
        at_model, at_clip = how.at(strength_model), how.at(strength_clip)
        applied = apply(adapter, model, clip, at_model, at_clip, how.runtime)
        return _shown(applied.report, applied.model, applied.clip)


NODES = (OFTLoad, OFTLoadModelOnly, OFTLoadAdapter, OFTApply)
