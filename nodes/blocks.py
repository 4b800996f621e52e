"""Strengths by block: a node that gives an adapter a factor for each part of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from ..oft_core import Adapter, BlockError, BlockWeights
from ..oft_core.block_weights import KINDS, PLACES, PRESETS
from . import compat, inputs

NO_PRESET = "none"
TIPS = {
    "adapter": "The adapter, from Load OFT Adapter, Train OFT or another OFT Block Strengths.",
    "preset": "A ready-made text for a family of models. Its rules come before the ones in blocks.",
    "blocks": (
        "Rules like 'all=0, output.3-5=1, te=0.5, output/attention=0.7'. The last rule that fits a layer "
        f"decides; without one it is 1. Places: all, {', '.join(PLACES)}. Kinds: {', '.join(KINDS)}."
    ),
    "out_adapter": "The same adapter with these factors on its strength, for Apply OFT or OFT Stack.",
    "out_blocks": "The rules in force, preset included, as text to copy.",
}


def _parsed(preset: str | None, text: str | None) -> BlockWeights:
    chosen = BlockWeights.parse(PRESETS.get(preset or NO_PRESET, ""))
    return chosen + BlockWeights.parse(text or "")


class OFTBlocks(io.ComfyNode):
    """Attach strengths by block to an adapter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_Blocks",
            display_name="OFT Block Strengths",
            category=inputs.CATEGORY,
            description=(
                "Gives parts of the model their own strength: blocks by name and number, text encoder "
                "layers, attention, feed-forward and convolution layers."
            ),
            search_aliases=[*inputs.ALIASES, "block weight", "lbw"],
            inputs=[
                inputs.OFTAdapter.Input("adapter", tooltip=TIPS["adapter"]),
                io.Combo.Input(
                    "preset", options=[NO_PRESET, *PRESETS], default=NO_PRESET, tooltip=TIPS["preset"]
                ),
                io.String.Input("blocks", default="", multiline=True, tooltip=TIPS["blocks"]),
            ],
            outputs=[
                inputs.OFTAdapter.Output(display_name="adapter", tooltip=TIPS["out_adapter"]),
                io.String.Output(display_name="blocks", tooltip=TIPS["out_blocks"]),
            ],
        )

    @classmethod
    def validate_inputs(cls, blocks: str | None = None) -> bool | str:
        try:
            _parsed(None, blocks)
        except BlockError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, adapter: Adapter, preset, blocks: str) -> io.NodeOutput:
        weights = _parsed(preset, blocks)
        if adapter.blocks is not None:
            weights = adapter.blocks + weights
        text = str(weights) or "all=1"
        return io.NodeOutput(_with(adapter, weights), text, ui=ui.PreviewText(text))


def _with(adapter: Adapter, weights: BlockWeights) -> Any:
    """The adapter with these rules; its layers are shared, nothing is read again."""
    return replace(adapter, blocks=weights if weights.rules else None)


NODES = (OFTBlocks,)
