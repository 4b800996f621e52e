"""From a prompt's tags to the loaded model: once for each pass of each picture, before the prompt is encoded."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..oft_core import Adapter, AdapterError, BlockWeights, listed
from ..oft_core.errors import printable
from ..oft_core.place import Placed, place
from . import files, hosts, infotext, settings, tags
from .hosts.contract import OURS, Part, Wanted
from .tags import Mention, Tag

log = logging.getLogger("oft")

LORA = "lora"
#: Under this name a pass's data says which files the tags meant, so that the host encodes a prompt anew when they change.
STATE = "oft state"
#: Reports and placed layers kept for the next picture.
KEPT = 8

_placed: OrderedDict[tuple, tuple[Adapter, Placed]] = OrderedDict()


@dataclass(frozen=True)
class Report:
    """What one tag did. text: the load report, or what went wrong.   applied: whether it turned anything."""

    tag: str
    text: str
    applied: bool


#: Of the last pass of the last picture, for the tab.
last: list[Report] = []


def activate(p: Any, data: Mapping[str, Sequence[Any]]) -> None:
    """Have the loaded model turned as a pass's tags say. data: the host's ``extra_network_data``."""
    try:
        _activate(p, data)
    except Exception as error:  # the host prints it and goes on drawing: then without us, and the picture says so
        hosts.current().put(p.sd_model, [])
        _tell(p, f"OFT: nothing was applied, because of an error in the extension: {type(error).__name__}: {printable(str(error), 300)}")
        raise


def _activate(p: Any, data: Mapping[str, Sequence[Any]]) -> None:
    host, model = hosts.current(), p.sd_model
    found = _mentions(p, data)
    reports: list[Report] = []
    wanted: list[Wanted] = []
    parts: list[Part] | None = None
    repeats: Counter[str] = Counter()
    for mention, after in found:
        try:
            tag = tags.parse(mention.items)
            file = files.find(tag.name)
            if parts is None:
                parts = host.parts(model)
            one, report = _wanted(tag, file, parts)
        except AdapterError as error:
            text = f"<{mention.kind}:{':'.join(mention.items)}>"
            reports.append(Report(text, str(error), False))
            _tell(p, f"OFT {printable(mention.items[0])}: {error}")
            continue
        repeats[one.identity] += 1
        again = f"#{repeats[one.identity]}" if repeats[one.identity] > 1 else ""
        wanted.append(replace(one, identity=one.identity + again, after=after, instead=mention.kind == LORA))
        reports.append(report)
    try:
        notes = host.put(model, wanted)
    except AdapterError as error:
        reports = [Report(str(one.tag), str(error), False) for one in wanted]
        wanted, notes = [], [str(error)]
        host.put(model, [])
    for note in notes:
        _tell(p, note)
    if isinstance(data, dict) and wanted:
        data[STATE] = [one.identity for one in wanted]
    last[:] = reports
    if settings.get("oft_report_below"):
        for report in reports:
            if report.applied:
                p.comment(report.text)
    infotext.write(p, wanted, [report.tag for report in reports if not report.applied])


def clear(p: Any) -> None:
    """Take everything of ours off the model of a picture that is drawn without extra networks."""
    hosts.current().put(p.sd_model, [])


def _wanted(tag: Tag, file: files.OFTFile, parts: Sequence[Part]) -> tuple[Wanted, Report]:
    adapter = files.read(file)
    if tag.blocks:
        adapter = replace(adapter, blocks=BlockWeights.parse(tag.blocks))
    at = settings.strengths(tag)
    said = (*listed.stamp(file.path), tag.blocks, *(f"{s.value!r} {s.mode} {s.coft}" for s in at.values()))
    identity = f"{OURS}{file.name}:{hashlib.sha256(repr(said).encode()).hexdigest()[:12]}"
    key = (identity, *(hash(tuple(part.shapes.items())) for part in parts))
    if key in _placed:
        _placed.move_to_end(key)
    else:
        _placed[key] = (adapter, place(adapter, parts, at))
        while len(_placed) > KEPT:
            _placed.popitem(last=False)
    placed = _placed[key][1]
    return Wanted(tag, file, identity, placed.patches), Report(str(tag), placed.report, True)


def _tell(p: Any, text: str) -> None:
    """In the host's own way: below the picture, and in the log."""
    log.warning("%s", text)
    p.comment(text)


def _mentions(p: Any, data: Mapping[str, Sequence[Any]]) -> list[tuple[Mention, tuple[str, ...]]]:
    """The tags for us, each with the names of the LoRA tags that stand before it in the prompt."""
    kinds = (tags.NAME, LORA)
    given = [Mention(kind, tuple(map(str, params.items))) for kind in kinds for params in data.get(kind, ())]
    spoken = [m for m in tags.mentions(_prompt(p), kinds) if m in given]
    # A script may have changed the tags on the way; then only the order within a kind is known, and LoRAs come first.
    if Counter(spoken) != Counter(given):
        spoken = [m for m in given if m.kind == LORA] + [m for m in given if m.kind != LORA]
    out, before = [], []
    for mention in spoken:
        if mention.kind == tags.NAME or _in_place_of_lora(mention):
            out.append((mention, tuple(before)))
        else:
            before.append(mention.items[0])
    return out


def _prompt(p: Any) -> str:
    """The first prompt of this pass's batch with its tags: the host takes them from that one only."""
    prompts = p.all_hr_prompts if getattr(p, "is_hr_pass", False) else p.all_prompts
    at = getattr(p, "iteration", 0) * p.batch_size
    return prompts[at] if prompts and at < len(prompts) else ""


def _in_place_of_lora(mention: Mention) -> bool:
    """Whether a ``<lora:…>`` tag is ours: the setting is on, and its file holds rotations."""
    if not settings.get("oft_lora_tags"):
        return False
    try:
        file = files.find(mention.items[0])
    except AdapterError:
        return False
    return files.get(file.name) is file
