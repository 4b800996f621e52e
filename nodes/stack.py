"""Several adapters at once: a list of them with switches and strengths, and the node that applies it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..oft_core import MODES, Adapter, AdapterError, StackError, Strength
from ..oft_core.errors import printable
from ..oft_core.stack import Share, blend, holds_oft
from ..oft_core.tensors import normal_tensors
from ..oft_core.training.filenames import inside
from . import compat, inputs
from .binding import folders, names
from .binding.apply import apply, patched, place
from .binding.plan import AUTO, plan

OFTStackType = io.Custom("OFT_STACK")
LoraStackType = io.Custom("LORA_STACK")
NUMBERS = (1, 2, 3, 4)
NONE = "none"
AS_NODE = "as the node"
COMPOSE, BLEND, BLEND_KEPT = "compose", "blend", "blend, angles kept"

TIPS = {
    "stack": "A stack to add to: its adapters come before the ones of this node.",
    "lora_stack": (
        "A LORA_STACK of another pack. Its OFT files are taken into this stack, with this node's mode and "
        "coft; its other files are handed on at other_loras."
    ),
    "adapter": "An adapter in memory, used in this row instead of a file.",
    "on": "Off leaves the row out without forgetting its settings. The file stays in memory.",
    "oft_name": "The OFT file of this row; none: the row is empty.",
    "strength_model": "This row's strength on the diffusion model.",
    "strength_clip": "This row's strength on the text encoders.",
    "row_mode": "This row's mode; 'as the node': that of the node's own mode.",
    "apply_stack": "The adapters to apply, from OFT Stack.",
    "how": (
        "compose: the rotations are multiplied in the order of the stack, as Load OFT nodes in a row. blend: "
        "one rotation that is the average of all, taken in the Lie algebra, so that the order does not "
        "matter; two adapters at strength 1 each act half. blend, angles kept: the same direction, turned as far as "
        "the adapters turn on average: a subject and a style keep their force."
    ),
    "out_stack": "All adapters, those of the incoming stack first.",
    "out_lora_stack": (
        "What came in as lora_stack and this stack's files that are on, as (name, strength_model, "
        "strength_clip), for packs that show or save such lists."
    ),
    "out_other_loras": "What came in as lora_stack and is no OFT file, for the other pack's own loader.",
    "out_list": "The stack in words: order, switches, strengths.",
}


@dataclass(frozen=True)
class Row:
    """One place in a stack. name: as files are listed. adapter: None for a file whose row is off."""

    name: str
    on: bool
    at_model: Strength
    at_clip: Strength
    adapter: Adapter | None

    @property
    def how(self) -> str:
        """Mode and limit in words."""
        at = self.at_model
        return f"{at.mode}, COFT " + (f"{at.coft:g} degrees" if isinstance(at.coft, float) else at.coft)

    def line(self) -> str:
        state = "" if self.on else " (off)"
        return f"{self.name}{state}: model {self.at_model.value:g}, clip {self.at_clip.value:g}, {self.how}"

    def entry(self) -> tuple[str, float, float]:
        """The row in a LORA_STACK."""
        return self.name, self.at_model.value, self.at_clip.value

    def unsaid(self) -> list[str]:
        """What of the row has no place in a LORA_STACK, in words."""
        plain = replace(self.at_model, value=1.0) == inputs.How().at(1.0)
        found = [] if plain else [self.how]
        if self.adapter is not None and self.adapter.blocks is not None:
            found.append("strengths by block")
        if self.adapter is not None and self.adapter.schedule is not None:
            found.append("a schedule")
        return found


def _described(rows: Sequence[Row], others: Sequence[tuple]) -> str:
    """The stack in words, and what of it the outputs for other packs do not say."""
    lines = [f"{i}. {row.line()}" for i, row in enumerate(rows, 1)] or ["The stack is empty."]
    on = [row for row in rows if row.on]
    unwritten = [row.name for row in on if not folders.find(row.name)]
    if unwritten:
        lines.append(f"Not in lora_stack, because it is no file of a listed folder: {', '.join(unwritten)}")
    bare = [
        f"{row.name} ({', '.join(row.unsaid())})" for row in on if row.name not in unwritten and row.unsaid()
    ]
    if bare:
        lines.append(f"lora_stack has no place for these, which are left out of it: {', '.join(bare)}")
    if others:
        lines.append(f"Not OFT, handed on at other_loras: {', '.join(e[0] for e in others)}")
    return "\n".join(lines)


def listed_name(adapter: Adapter) -> str | None:
    """The name under which file lists show the adapter's file, or None if it is not from such a folder."""
    for folder in folder_paths.get_folder_paths(folders.FOLDER):
        name = inside(adapter.path, folder)
        if name is not None and folders.find(name) is not None and os.path.isfile(adapter.path):
            return name
    return None


def _row(name: str, on: bool, at_model: Strength, at_clip: Strength) -> Row:
    """A row of a file. Raises FileError for a name that means no file or several, unless the row is off."""
    if on:
        return Row(folders.locate(name), on, at_model, at_clip, folders.read(name))
    found = folders.meant(name)
    return Row(found[0] if len(found) == 1 else name, on, at_model, at_clip, None)


class _Taken:
    """Files taken from LORA_STACKs, which a node cannot name when the host asks whether its inputs have changed."""

    def __init__(self) -> None:
        self._stamps: dict[str, str] = {}
        self._replaced = 0

    def taken(self, name: str) -> None:
        self._stamps.setdefault(name, folders.fingerprint(name))

    def state(self) -> str:
        """A string that changes when one of these files does."""
        now = {name: folders.fingerprint(name) for name in self._stamps}
        if now != self._stamps:
            self._stamps, self._replaced = now, self._replaced + 1
        return f"{self._replaced} replaced"


_from_stacks = _Taken()


def _from_lora_stack(
    stack: Sequence[Sequence[Any]], at: Strength
) -> tuple[list[Row], list[tuple[str, float, float]]]:
    """OFT rows of a LORA_STACK, and the entries that are something else or not to be found here.

    Raises FileError for a name that several files fit of which one is OFT: no other loader can tell which is meant.
    """
    rows, others = [], []
    for entry in stack:
        if not isinstance(entry, (tuple, list)) or len(entry) < 3 or not isinstance(entry[0], str):
            raise AdapterError(
                "lora_stack is not a list of (name, strength_model, strength_clip)", found=repr(entry)
            )
        if not any(map(_opens, folders.meant(entry[0]))):
            others.append(tuple(entry))
            continue
        at_model, at_clip = (replace(at, value=float(s)) for s in entry[1:3])
        rows.append(_row(entry[0], True, at_model, at_clip))
        _from_stacks.taken(entry[0])
    return rows, others


def _opens(name: str) -> bool:
    """Whether a listed file is OFT. Other packs list LoRAs in formats that are not opened here."""
    path = folders.find(name)
    return path is not None and folders.reads(path) and holds_oft(path)


def _about_names(given: Iterable[str], others: Iterable[tuple]) -> list[str]:
    """Lines on names that are listed in another way here, or not at all. given: of rows that are on."""
    lines = [said for name in given if (said := folders.other_name(name)) is not None]
    for name, *_ in others:
        if not folders.meant(name):
            similar = ", ".join(folders.nearest(name))
            lines.append(f"Not in the folders here: {printable(name)}" + (f" (similar: {similar})" if similar else ""))
    return lines


def _row_inputs(i: int) -> list[io.Input]:
    more = {"optional": True}
    return [
        io.Boolean.Input(f"on_{i}", default=True, tooltip=TIPS["on"], **more),
        io.Combo.Input(
            f"oft_name_{i}", options=[NONE, *folders.names()], default=NONE, tooltip=TIPS["oft_name"], **more
        ),
        inputs.strength(f"strength_model_{i}", TIPS["strength_model"], **more),
        inputs.strength(f"strength_clip_{i}", TIPS["strength_clip"], **more),
    ]


def _adapter(i: int) -> io.Input:
    return inputs.OFTAdapter.Input(f"adapter_{i}", tooltip=TIPS["adapter"], optional=True)


def _mode(i: int) -> io.Input:
    options = [AS_NODE, *MODES]
    return io.Combo.Input(
        f"mode_{i}", options=options, default=AS_NODE, tooltip=TIPS["row_mode"], optional=True
    )


class OFTStack(io.ComfyNode):
    """A list of adapters; chain the node for more rows."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_Stack",
            display_name="OFT Stack",
            category=inputs.CATEGORY,
            description=(
                "Collects OFT files and adapters with a switch and strengths for each, in order. Several of "
                "these nodes in a row make a longer stack."
            ),
            search_aliases=[*inputs.ALIASES, "lora stack", "multi"],
            inputs=[
                OFTStackType.Input("stack", optional=True, tooltip=TIPS["stack"]),
                LoraStackType.Input("lora_stack", optional=True, tooltip=TIPS["lora_stack"]),
                *map(_adapter, NUMBERS),
                *inputs.how(),
                *(entry for i in NUMBERS for entry in _row_inputs(i)),
                # After the rows: graphs that were saved without them list their values in this order.
                *map(_mode, NUMBERS),
            ],
            outputs=[
                OFTStackType.Output(display_name="stack", tooltip=TIPS["out_stack"]),
                LoraStackType.Output(display_name="lora_stack", tooltip=TIPS["out_lora_stack"]),
                LoraStackType.Output(display_name="other_loras", tooltip=TIPS["out_other_loras"]),
                io.String.Output(display_name="report", tooltip=TIPS["out_list"]),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        oft_name_1: str | None = None,
        oft_name_2: str | None = None,
        oft_name_3: str | None = None,
        oft_name_4: str | None = None,
        on_1: bool = True,
        on_2: bool = True,
        on_3: bool = True,
        on_4: bool = True,
    ) -> bool | str:
        # Each by its own name, because the host leaves the checks of all others to itself then.
        given = zip((oft_name_1, oft_name_2, oft_name_3, oft_name_4), (on_1, on_2, on_3, on_4), strict=True)
        checks = [inputs.checked_file(name) for name, on in given if on is not False and name != NONE]
        return next((c for c in checks if c is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> str:
        names = [given.get(f"oft_name_{i}") for i in NUMBERS]
        own = [folders.fingerprint(name) for name in names if name and name != NONE]
        # Of what is connected the host says here only that it is: see `_from_stacks`.
        return "\n".join([*own, _from_stacks.state()] if "lora_stack" in given else own)

    @classmethod
    def execute(
        cls,
        stack=None,
        lora_stack=None,
        mode=inputs.How.mode,
        coft=inputs.How.coft,
        coft_degrees=inputs.How.coft_degrees,
        **given: Any,
    ) -> io.NodeOutput:
        at = inputs.How(mode, coft, coft_degrees).at(1.0)
        from_loras, others = _from_lora_stack(lora_stack or (), at)
        rows = [*(stack or ()), *from_loras]
        named = [entry[0] for entry in lora_stack or () if tuple(entry) not in others]
        for i in NUMBERS:
            adapter, name = given.get(f"adapter_{i}"), given.get(f"oft_name_{i}", NONE)
            on, own = given.get(f"on_{i}", True), given.get(f"mode_{i}", AS_NODE)
            at_row = at if own == AS_NODE else replace(at, mode=own)
            at_model, at_clip = (
                replace(at_row, value=float(given.get(f"strength_{part}_{i}", 1.0)))
                for part in ("model", "clip")
            )
            if adapter is not None:
                rows.append(Row(listed_name(adapter) or adapter.name, on, at_model, at_clip, adapter))
            elif name and name != NONE:
                rows.append(_row(name, on, at_model, at_clip))
                named += [name] if on else []
        written = [row.entry() for row in rows if row.on and folders.find(row.name)]
        text = "\n".join([_described(rows, others), *_about_names(named, others)])
        return io.NodeOutput(tuple(rows), [*others, *written], others, text, ui=ui.PreviewText(text))


class OFTApplyStack(io.ComfyNode):
    """Apply all adapters of a stack that are on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return compat.schema(
            node_id="OFT_ApplyStack",
            display_name="Apply OFT Stack",
            category=inputs.CATEGORY,
            description=(
                "Applies a stack of OFT adapters: one after the other, or averaged into one rotation."
            ),
            search_aliases=[*inputs.ALIASES, "lora stack", "merge"],
            inputs=[
                OFTStackType.Input("stack", tooltip=TIPS["apply_stack"]),
                inputs.model(optional=True),
                inputs.clip(),
                io.Combo.Input("how", options=[COMPOSE, BLEND, BLEND_KEPT], default=COMPOSE, tooltip=TIPS["how"]),
                inputs.where(),
            ],
            outputs=[inputs.MODEL_OUT, inputs.CLIP_OUT, inputs.REPORT_OUT],
        )

    @classmethod
    def execute(cls, stack, how, model=None, clip=None, runtime="auto") -> io.NodeOutput:
        if model is None and clip is None:
            raise ValueError("Apply OFT Stack: connect a MODEL, a CLIP, or both.")
        rows = [row for row in stack if row.on]
        if not rows:
            text = "The stack has no adapter that is on; nothing changed."
            return io.NodeOutput(model, clip, text, ui=ui.PreviewText(text))
        if how == COMPOSE:
            model, clip, text = apply_in_order(rows, model, clip, runtime)
        else:
            model, clip, text = apply_blend(rows, model, clip, runtime, keep_angles=how == BLEND_KEPT)
        off = [row.name for row in stack if not row.on]
        text += f"\nOff: {', '.join(off)}" if off else ""
        return io.NodeOutput(model, clip, text, ui=ui.PreviewText(text))


def apply_in_order(
    rows: Sequence[Row], model: Any | None, clip: Any | None, where: str = AUTO
) -> tuple[Any, Any, str]:
    """Patched MODEL and CLIP and a report; the rows act in their order. Raises what `apply` raises.

    where: one of `RUNTIMES`.
    """
    texts = []
    for i, row in enumerate(rows, 1):
        applied = apply(row.adapter, model, clip, row.at_model, row.at_clip, where)
        model, clip = applied.model, applied.clip
        texts.append(f"{i}. {applied.report}")
    return model, clip, "\n\n".join([f"{len(rows)} adapters, applied in this order.", *texts])


def apply_blend(
    rows: Sequence[Row], model: Any | None, clip: Any | None, where: str = AUTO, *, keep_angles: bool = False
) -> tuple[Any, Any, str]:
    """Patched MODEL and CLIP and a report; one rotation for all rows. Raises `StackError` if there is none.

    The average of each side is over the adapters that have layers for it. keep_angles: see `blend`.
    """
    for row in rows:
        if row.adapter.schedule is not None:
            raise StackError(
                "An adapter that follows a schedule cannot be blended with others",
                file=row.name,
                found=str(row.adapter.schedule),
                hint="Use 'compose'.",
            )
    sides = names.sides_of(model, clip)
    placed = [place(row.adapter, sides, row.at_model, row.at_clip) for row in rows]
    lines = [f"{len(rows)} adapters blended{', angles kept' if keep_angles else ''}, whatever their order:"]
    lines += [f"- {row.line()}" for row in rows]
    given = {"model": model, "clip": clip}
    for side in sides:
        shares = [
            [Share(patch, at, row.name) for patch, at in there.patches[side.name]]
            for row, there in zip(rows, placed, strict=True)
        ]
        count = sum(bool(mine) for mine in shares)
        if not count:
            continue
        with normal_tensors():
            patches = blend([share for mine in shares for share in mine], count, side.shapes, keep_angles=keep_angles)
            whole = [(patch, Strength()) for patch in patches]
            ways = plan(side, whole, where)
            given[side.name] = patched(side, ways)
        lines.append(f"{side.words}: average of {count}, {len({p.key for p in patches})} weights turned.")
        lines += ways.notes
    reports = [there.report for there in placed]
    return given["model"], given["clip"], "\n\n".join(["\n".join(lines), *reports])


NODES = (OFTStack, OFTApplyStack)
