"""OFT Inspect: what an adapter does, as a picture, a report and numbers."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..oft_core import Adapter, describe
from ..oft_core.pictures import adapter_picture, comparison_picture
from ..oft_core.profile import between, profile, table_between
from ..oft_core.tensors import normal_tensors
from ..oft_core.training.dataset import from_pillow
from . import compat
from .binding import names
from .inputs import ALIASES, CATEGORY, OFTAdapter

TIPS = {
    "adapter": "The adapter to look at, from Load OFT Adapter or Train OFT.",
    "against": "A second adapter: both are drawn side by side, with the angle from the first to the second.",
    "model": "The model that the adapter is for: layers are then named and ordered as in the model.",
    "clip": "Its text encoders, if the adapter has layers for them.",
    "out_picture": (
        "Angles of all layers (rows) and blocks (columns), bars for each block of the model, and a histogram."
    ),
    "out_report": "What the file is and how far it turns; with a second adapter a line for every layer.",
    "out_json": "The same numbers as JSON, with the largest angle of every block.",
}


class OFTInspect(io.ComfyNode):
    """OFT Inspect: an adapter made visible."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        entry = compat.explained(TIPS)
        return compat.schema(
            node_id="OFT_Inspect",
            display_name="OFT Inspect",
            category=CATEGORY,
            description="Draws how far an OFT adapter turns every layer and block, or how two adapters differ.",
            search_aliases=[*ALIASES, "inspect", "plot", "compare"],
            is_output_node=True,
            inputs=[
                OFTAdapter.Input("adapter", tooltip=TIPS["adapter"]),
                OFTAdapter.Input("against", optional=True, tooltip=TIPS["against"]),
                entry(io.Model.Input, "model", optional=True),
                entry(io.Clip.Input, "clip", optional=True),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip=TIPS["out_picture"]),
                io.String.Output(display_name="report", tooltip=TIPS["out_report"]),
                io.String.Output(display_name="json", tooltip=TIPS["out_json"]),
            ],
        )

    @classmethod
    def execute(cls, adapter: Adapter, against: Adapter | None = None, model=None, clip=None) -> io.NodeOutput:
        index = None if model is None and clip is None else names.index_of(model, clip)
        bind = None if index is None else (lambda one: one.bind(index))
        with normal_tensors():
            binding = None if bind is None else bind(adapter)
            report = describe(adapter, binding)
            numbers, lines = report.to_dict(), [report.to_text()]
            layers = profile(adapter, binding)
            numbers["layers_detail"] = [p.to_dict() for p in layers]
            if against is None:
                on = "" if binding is None else binding.family
                image = from_pillow(adapter_picture(adapter, layers, on))
            else:
                found = between(adapter, against, bind)
                lines.append(table_between(found))
                numbers["against"] = [
                    {
                        "name": b.name,
                        "angle": None if b.angle is None else float(b.angle.max()),
                        "likeness": b.likeness,
                        "reason": b.reason,
                    }
                    for b in found
                ]
                image = from_pillow(comparison_picture(adapter, against, bind))
        text = "\n\n".join(lines)
        shown = ui.PreviewImage(image, cls=cls).as_dict() | ui.PreviewText(report.to_text()).as_dict()
        return io.NodeOutput(image, text, json.dumps(numbers, ensure_ascii=False), ui=shown)


NODES = (OFTInspect,)
