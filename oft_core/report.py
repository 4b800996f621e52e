"""What a file is and what it did, for people and for programs."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from .adapter import PEFT_BASE, Adapter, Binding
from .constraint import Strength
from .errors import printable
from .formats import DIALECTS
from .layer import Diff, LayerRotation
from .measure import measure
from .names import guess_family, is_language_model
from .tensors import full_precision

_TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger", "trigger_words", "ss_trigger", "instance_prompt")
_SHOWN_METADATA = (
    "ss_output_name", "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim", "ss_network_alpha",
    "ss_learning_rate", "ss_steps", "ss_num_train_images", "modelspec.title", "modelspec.architecture", "modelspec.date",
    "modelspec.author", "modelspec.description", "ot_revision",
)
_NAMES = {"unet": "UNet/DiT", "te1": "text encoder 1", "te2": "text encoder 2", "te3": "text encoder 3 (T5)"}


@dataclass
class ComponentReport:
    """One part of a model: layers matched and in all; names of those without a place."""

    layers: int = 0
    matched: int | None = None
    unmatched: list[str] = field(default_factory=list)


@dataclass
class Report:
    """All that is known about an adapter, and about its use if it was bound to a model.

    Angles in degrees, at strength 1 with the limits of ``coft``. angles_estimated: the largest is that of the strongest blocks only (of
    very large files); mean_estimated: the mean is from a sample of the blocks (of most full-size files). orthogonality_error: upper
    bound of |M^T M - I| over the entries of all blocks at strength 1; measured where finished matrices are stored.
    language: whether it turns a language model.   radius_in_use: largest stored generator norm over its limit; above 1 the limit is active; None without a limit, or if it is 0.
    """

    file: str
    dialect: str
    title: str
    reason: str
    side: str
    layers: int
    components: dict[str, ComponentReport]
    block_sizes: dict[int, int]
    subspace: bool
    kinds: list[str]
    max_angle: float | None
    mean_angle: float | None
    angles_estimated: bool
    mean_estimated: bool
    orthogonality_error: float | None
    constraint: str | None
    radius_in_use: float | None
    limits_active: int
    row_scales: bool
    base_model: str
    language: bool
    trigger_words: list[str]
    metadata: dict[str, str]
    strength: dict | None
    notes: list[str]
    warnings: list[str]

    def to_dict(self) -> dict:
        """Plain values only."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_text(self) -> str:
        """A short text for people; the same facts without the long lists."""
        lines = [f"{self.file}: {self.title} ({self.dialect}, because of {self.reason})"]
        if self.strength is not None:
            coft = self.strength["coft"]
            coft = f"{coft:g} degrees" if isinstance(coft, float) else coft
            lines.append(f"Strength {self.strength['value']:g}, mode {self.strength['mode']}, COFT {coft}.")
        for name, part in self.components.items():
            label = "Language model" if self.language and name == "unet" else _NAMES.get(name, name)
            if part.matched is None:
                lines.append(f"{label}: {part.layers} layers")
            else:
                lines.append(f"{label}: {part.matched} of {part.layers} layers applied")
        sizes = ", ".join(f"{b} ({n})" for b, n in sorted(self.block_sizes.items()))
        what = f"Turns a subspace of each layer's {self.side}s; dimensions" if self.subspace else f"Blocks on the {self.side} side; block sizes"
        lines.append(f"{what} (layers): {sizes or 'none'}")
        about, mean_about = ("about " if rough else "" for rough in (self.angles_estimated, self.mean_estimated))
        if self.max_angle is not None:
            lines.append(f"Largest angle {about}{self.max_angle:.2f}°, mean {mean_about}{self.mean_angle:.2f}°.")
        if self.orthogonality_error is not None:
            lines.append(f"Orthogonality error {about or 'at most '}{self.orthogonality_error:.1e}.")
        if self.constraint is not None:
            active = f"active in {self.limits_active} layers" if self.limits_active else "not active"
            used = "a radius of 0" if self.radius_in_use is None else f"{100 * self.radius_in_use:.0f} % of the radius in use at most"
            lines.append(f"COFT: {self.constraint}; {used}, {active}.")
        if self.row_scales:
            lines.append("Has row scales (rescale or DoRA).")
        if self.base_model:
            lines.append(f"Base model: {self.base_model}")
        if self.trigger_words:
            lines.append("Trigger: " + ", ".join(self.trigger_words))
        lines += [f"Note: {n}" for n in self.notes]
        lines += [f"WARNING: {w}" for w in self.warnings]
        return "\n".join(printable(line, 1000) for line in lines)


@full_precision()
def describe(adapter: Adapter, binding: Binding | None = None, strength: Strength | None = None) -> Report:
    """Facts about a file, and with ``binding`` about its place in a model. Takes less work than building its rotations."""
    operations = _operations(adapter, binding)
    rotations = [(m, op) for m, ops in operations.items() for op in ops if isinstance(op, LayerRotation)]
    modules, rotations = [m for m, _ in rotations], [op for _, op in rotations]
    warnings: list[str] = []
    measures = measure(rotations, strength)
    limits = [r.constraint for r in rotations if r.constraint is not None]
    uses = [c.use() for c in limits]
    diverging = list(dict.fromkeys(modules[i] for i in measures.diverging))
    if diverging:
        warnings.append(
            f"The Neumann series diverges in {len(diverging)} layers (e.g. {diverging[0]}): broken in its own trainer too; "
            "only strength 1 or mode linear."
        )
    if binding is not None and binding.unmatched:
        first = next(iter(binding.unmatched))
        warnings.append(f"{len(binding.unmatched)} layers found no place in this model, e.g. {first}")
    if binding is not None:
        warnings += _misplaced(binding)
    if measures.top is not None and not (strength is not None and isinstance(strength.coft, float)):  # a limit of the user's is no training
        warnings += _untrained(adapter, rotations, math.degrees(measures.top))
    if strength is not None and strength.mode != "linear" and measures.reach is not None:
        reach = math.degrees(measures.reach)
        if reach > 120:
            warnings.append(f"At this strength planes turn by up to {reach:.0f}°; above 120° pictures tend to break.")
    if any(r.row_scale is not None and not r.norm_of and float(r.row_scale.min()) <= 0 for r in rotations):
        warnings.append("Some row scales are not positive; these follow the strength linearly.")
    if adapter.unknown:
        warnings.append(f"{len(adapter.unknown)} keys of the file are not OFT and were not applied, e.g. {adapter.unknown[0]}")
    sides = {DIALECTS[adapter.dialect].input_side}
    return Report(
        file=adapter.name, dialect=adapter.dialect, title=adapter.title, reason=adapter.reason,
        side="input" if sides == {True} else "output", layers=len(adapter.entries), components=_components(adapter, binding),
        block_sizes=dict(Counter(r.block for r in rotations)), subspace=any(r.subspace for r in rotations), kinds=sorted({r.kind for r in rotations}),
        max_angle=None if measures.top is None else math.degrees(measures.top),
        mean_angle=None if measures.mean is None else math.degrees(measures.mean),
        angles_estimated=measures.top_estimated, mean_estimated=measures.mean_estimated, orthogonality_error=measures.error,
        constraint=limits[0].family if limits else None, radius_in_use=max(uses) if uses and max(uses) < math.inf else None,
        limits_active=sum(u > 1 for u in uses), row_scales=any(r.row_scale is not None for r in rotations),
        base_model=_base_model(adapter), language=is_language_model(adapter.entries), trigger_words=trigger_words(adapter.metadata),
        metadata={k: printable(adapter.metadata[k]) for k in _SHOWN_METADATA if adapter.metadata.get(k)},
        strength=None if strength is None else {"value": strength.value, "mode": strength.mode, "coft": strength.coft},
        notes=[*adapter.notes, *_of_two_experts(adapter, binding)], warnings=warnings,
    )


_EXPERT = re.compile(r"(high|low)[-_ ]?noise", re.IGNORECASE)


def _of_two_experts(adapter: Adapter, binding: Binding | None) -> list[str]:
    """Wan 2.2 (14B) is two models of one form, which no name of a layer tells apart."""
    if binding is None or binding.family != "wan":
        return []
    said = _EXPERT.search(os.path.basename(adapter.name))
    if said is None:
        return ["If this is Wan 2.2 (14B): its models for high and for low noise need a file each."]
    this, other = said[1].lower(), {"high": "low", "low": "high"}[said[1].lower()]
    return [f"By its name this file is for Wan 2.2's model for {this} noise; the one for {other} noise needs a file of its own."]


#: Degrees. Below the first a file does nothing that a picture shows; above the second a training has lost its way.
_NOTHING_LEARNT, _DIVERGED = 0.05, 150.0


def _misplaced(binding: Binding) -> list[str]:
    """Plain words for a file that is probably for another model."""
    out = []
    if binding.other_family:
        out.append(f"The file says that it was made for {binding.other_family}; this model is {binding.family}.")
    here = len(binding.matched) + len(binding.missing)
    if len(binding.missing) > here // 3:
        out.append(
            f"Only {len(binding.matched)} of {here} layers fit: the file was probably made for another model "
            f"(its names: {guess_family(binding.adapter.entries)}; this model: {binding.family})."
        )
    return out


def _untrained(adapter: Adapter, rotations: list[LayerRotation], top: float) -> list[str]:
    """Plain words for a training that taught nothing or diverged. top: largest angle at strength 1 in degrees."""
    others = any(r.row_scale is not None or r.col_scale is not None or r.added is not None for r in rotations)
    others = others or any(e.dialect == "F5d" for e in adapter.entries.values())
    if top == 0 and not others:
        return ["All rotations in this file are zero: it changes nothing."]
    if top < _NOTHING_LEARNT and not others:
        return [f"The largest angle is {top:.1g}\N{DEGREE SIGN}: this file changes next to nothing; its training has hardly begun."]
    if top > _DIVERGED and not any(r.basis is not None for r in rotations):  # reflections are half turns
        return [f"Planes turn by up to {top:.0f}\N{DEGREE SIGN} at strength 1: its training has probably diverged."]
    return []


def _operations(adapter: Adapter, binding: Binding | None) -> dict[str, list[LayerRotation | Diff]]:
    if binding is None:
        return {m: [p.op for p in pieces if p.param == "weight"] for m, pieces in adapter.operations().items()}
    out: dict[str, list[LayerRotation | Diff]] = {}
    for patch in binding.patches:
        ops = out.setdefault(patch.module, [])
        if not patch.key.endswith("bias") and not any(o is patch.op for o in ops):
            ops.append(patch.op)
    return out


def _components(adapter: Adapter, binding: Binding | None) -> dict[str, ComponentReport]:
    out: dict[str, ComponentReport] = {}
    matched = set(binding.matched) if binding else set()
    for name, entry in adapter.entries.items():
        part = out.setdefault(entry.component, ComponentReport(matched=None if binding is None else 0))
        part.layers += 1
        if binding is not None:
            if name in matched:
                part.matched += 1
            else:
                part.unmatched.append(name)
    return dict(sorted(out.items(), key=lambda item: list(_NAMES).index(item[0])))


_BASE_KEYS = ("ss_base_model_version", "modelspec.architecture", PEFT_BASE)


def _base_model(adapter: Adapter) -> str:
    known = next((said for key in _BASE_KEYS if (said := adapter.metadata.get(key))), "")
    guess = "a language model" if is_language_model(adapter.entries) else guess_family(adapter.entries)
    return f"{known} (names: {guess})" if known else guess


def trigger_words(metadata: Mapping[str, str], *, guess: bool = True) -> list[str]:
    """Trigger words that the trainer wrote down, else, with ``guess``, the commonest tags of the training captions."""
    found = [metadata[k].strip() for k in _TRIGGER_KEYS if metadata.get(k, "").strip()]
    if found:
        return [printable(t, 200) for t in found]
    if not guess:
        return []
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):  # also numbers too long to read, and brackets nested without end
        return []
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        if isinstance(tags, dict):
            counts.update({str(t).strip(): int(n) for t, n in tags.items() if isinstance(n, (int, float)) and 0 < n < 10**9})
    return [printable(t, 100) for t, _ in counts.most_common(5) if t]
