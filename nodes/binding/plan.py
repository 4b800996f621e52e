"""Which way each layer of a file goes: its weight is patched, or its activations are turned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...oft_core import AdapterError, Diff, LayerRotation, Patch, Strength
from .layers import CONV, EMBEDDING, gguf_type, hookable, kind_of, layer_of, nameless, patchable, stored_as
from .names import Side

AUTO, WEIGHTS, ACTIVATIONS = "auto", "weights", "activations"
RUNTIMES = (AUTO, WEIGHTS, ACTIVATIONS)


@dataclass(frozen=True)
class Plan:
    """A file's patches with their strengths, by the way in which they are applied, and lines about it."""

    weights: list[tuple[Patch, Strength]]
    live: list[tuple[Patch, Strength]]
    notes: list[str]


def _obstacle(kind: str | None, ops: Iterable[LayerRotation | Diff]) -> str | None:
    """Why these changes of one parameter are not made on activations."""
    if kind is None:
        return "no matrix with an input and an output"
    if kind == EMBEDDING and any(
        isinstance(op, Diff) or op.side == "out" or op.row_scale is not None or op.added is not None
        for op in ops
    ):
        return "rows of an embedding"
    if kind != CONV and any(isinstance(op, LayerRotation) and op.memory_view for op in ops):
        return "a rotation of the weight's memory"
    return None


def plan(side: Side, placed: Iterable[tuple[Patch, Strength]], runtime: str) -> Plan:
    """Decide layer by layer. runtime: one of `RUNTIMES`.

    `auto` turns activations where the weight is quantised and patches weights everywhere else. Raises
    AdapterError where the only way left would change numbers that a patch cannot reach.
    """
    model, words = side.patcher.model, side.words
    placed = [(patch, at) for patch, at in placed if at.value != 0]
    by_key: dict[str, list[Patch]] = {}
    for patch, _ in placed:
        by_key.setdefault(patch.key, []).append(patch)
    live: set[str] = set()
    why: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    rounded: Counter[str] = Counter()
    for key, patches in by_key.items():
        module, leaf = layer_of(model, key)
        kind = kind_of(module, leaf)
        stored = stored_as(module) if leaf == "weight" else None
        obstacle = _obstacle(kind, (p.op for p in patches))
        if obstacle is None and (runtime == ACTIVATIONS or (runtime == AUTO and stored is not None)):
            live.add(key)
            why[stored or "plain weights"] += 1
            continue
        if leaf == "weight" and not patchable(module):
            raise AdapterError(
                "The weight of this layer cannot be patched",
                module=patches[0].module,
                found=f"a weight stored as {stored}",
                expected="a weight of floating-point numbers",
                hint=(
                    f"Not on activations either ({obstacle}): use another version of the model."
                    if obstacle is not None
                    else "Set runtime to 'auto' or 'activations'."
                ),
            )
        if obstacle is not None and leaf == "weight" and (runtime == ACTIVATIONS or stored is not None):
            kept[obstacle] += 1
        if stored is not None:
            rounded[stored] += 1
    notes = []
    if live:
        kinds = ", ".join(f"{n} {name}" for name, n in why.most_common())
        rest = len(by_key) - len(live)
        others = f", the weights of {rest} others are patched" if rest else ""
        notes.append(f"{words}: activations of {len(live)} layers are turned ({kinds}){others}.")
        # GGUF loaders give their layers empty stand-ins for saving, with patches or without.
        packed = any(name.startswith("GGUF") for name in why)
        way_out = (
            "ComfyUI cannot save GGUF models at all. Bake the file into an unquantised version of the model"
            if packed
            else "to bake the file in, set runtime to 'weights'"
        )
        notes.append(f"Turned activations are not part of a saved checkpoint; {way_out}.")
    if rounded:
        kinds = ", ".join(f"{n} {name}" for name, n in rounded.most_common())
        notes.append(
            f"{words}: quantised weights are patched ({kinds}): rounded again, or unpacked and patched in "
            "every step."
        )
    notes += [f"{words}: {n} layers stay with weight patches ({reason})." for reason, n in kept.items()]
    return Plan([e for e in placed if e[0].key not in live], [e for e in placed if e[0].key in live], notes)


def plan_for_hook(side: Side, placed: Iterable[tuple[Patch, Strength]]) -> Plan:
    """As `plan`, for patches that a hook puts on and takes off while sampling. Raises AdapterError.

    Where ComfyUI can change no weight for a hook, as in GGUF models, all that can be turned is.
    """
    why_not = weights_out_of_reach(side.patcher)
    made = plan(side, placed, AUTO if why_not is None else ACTIVATIONS)
    for patch, _ in made.weights:
        module, leaf = layer_of(side.patcher.model, patch.key)
        if why_not is not None or (leaf == "weight" and not hookable(module)):
            stored = stored_as(module) if leaf == "weight" else None
            raise AdapterError(
                "A hook cannot make this change in this model",
                module=patch.module,
                found=why_not or f"a weight stored as {stored}",
                expected="weights that ComfyUI's hooks can patch, or a change that activations can have",
                hint=HOOK_WAY_OUT,
            )
    return made


HOOK_WAY_OUT = (
    "Use Load OFT, or OFT Schedule with Apply OFT, which act on all conditionings; or a version of the model that is "
    "not quantised."
)


def weights_out_of_reach(patcher: Any) -> str | None:
    """Why ComfyUI can patch none of a model's weights for hooks, in words; None where it can."""
    if getattr(patcher, "is_dynamic", lambda: False)():
        return "a model in dynamic VRAM, for which ComfyUI has no weight hooks"
    if any(gguf_type(p) is not None for p in patcher.model.parameters()):
        return "a GGUF model, whose tensors are not plain numbers"
    # ComfyUI collects the weights of all names first.
    key = nameless(patcher.model, patcher.model_state_dict())
    return None if key is None else f"a quantised model whose weights hooks cannot read ({key})"
