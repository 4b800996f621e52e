"""From a file to the one in-memory form, and from there to the parameters of a model."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .block_weights import BlockWeights, factors
from .constraint import Strength
from .errors import AdapterError, FileError, FormatError, ModelMismatch, ValueFault
from .formats import (
    DIALECTS,
    Context,
    Module,
    ReadOptions,
    detect,
    group,
    peft_reason,
    reader,
    what_is_it,
)
from .formats.common import Maker, Piece
from .formats.peft import PEFT_TYPES
from .layer import Built, Diff, LayerRotation, build_all
from .names import DECLARED, NameIndex, Target, component, declared_family, guess_family, loose_clip
from .schedule import Schedule
from .tensors import full_precision

__all__ = ["Adapter", "Binding", "Entry", "Patch", "build_all", "load_adapter", "read_tensors"]


@dataclass(slots=True)
class Entry:
    """One adapted layer as the file names it."""

    source: Module
    dialect: str
    #: Which CLIP a name without a prefix is for: te1, or te2 in a file that has a CLIP-G's layers.
    clip: str = "te1"
    _maker: Maker | None = field(default=None, repr=False, compare=False)
    _pieces: dict[tuple[int, ...] | None, list[Piece]] | None = field(default=None, repr=False, compare=False)

    @property
    def module(self) -> str:
        return self.source.name

    def make(self, shape: Sequence[int] | None) -> list[Piece]:
        """What to do with a weight of this shape (None: not known, a plain Linear layer). Raises the reader's errors."""
        if self._maker is None:  # what it has computed from the numbers serves every shape
            self._maker = reader(self.source, self.dialect)
        return self._maker(shape)

    def pieces(self, shape: Sequence[int] | None) -> list[Piece]:
        """The same, kept with what its rotations have computed, so that a file that stays in memory answers at once for another
        strength."""
        key = None if shape is None else tuple(shape)
        if self._pieces is None:
            self._pieces = {}
        if key not in self._pieces:
            self._pieces[key] = self.make(shape)
        return self._pieces[key]

    @property
    def component(self) -> str:
        return component(self.module, self.clip)


@dataclass(frozen=True)
class Patch:
    """One operation on one parameter of a model.

    key: the parameter in the base.   rows: (start, length) along dimension 0, None for all.
    swap_halves: the file's row order is [second half, first half] of the base's (AdaLN layers in diffusers' order).
    """

    module: str
    key: str
    op: LayerRotation | Diff
    component: str = "unet"
    rows: tuple[int, int] | None = None
    swap_halves: bool = False

    def apply_(
        self, weight: Tensor, strength: Strength, *, rotation: Built | None = None, measured: Tensor | None = None
    ) -> None:
        """Apply to the whole parameter ``weight`` in place; see ``LayerRotation.apply_``. measured: as ``measure`` gives."""
        view = weight if self.rows is None else weight.narrow(0, *self.rows)
        try:
            apply_swapped_(self.op, view, strength, self.swap_halves, rotation=rotation, measured=measured)
        except AdapterError as error:
            error.module = error.module or self.module
            raise


    def measure(self, weight: Tensor) -> Tensor | None:
        """What the operation needs of the whole unpatched parameter ``weight`` (see ``LayerRotation.measure``), or None; norms in its order."""
        if not self.op.needs_base:
            return None
        view = weight if self.rows is None else weight.narrow(0, *self.rows)
        if self.swap_halves and isinstance(self.op, LayerRotation) and self.op.basis_of is not None:
            view = torch.cat(view.chunk(2)[::-1])
        return self.op.measure(view)


def apply_swapped_(
    op: LayerRotation | Diff, view: Tensor, strength: Strength, swap: bool, *,
    rotation: Built | None = None, measured: Tensor | None = None,
) -> None:
    """Apply ``op`` in place to ``view``, through a copy with exchanged halves if ``swap`` (one small AdaLN layer a model)."""
    if strength.value == 0:
        return
    if not swap:
        op.apply_(view, strength, rotation=rotation, measured=measured)
        return
    half = view.shape[0] // 2
    work = torch.cat([view[half:], view[:half]])
    if measured is not None and measured.ndim == 1:
        measured = torch.cat([measured[half:], measured[:half]])
    op.apply_(work, strength, rotation=rotation, measured=measured)
    view[:half].copy_(work[half:])
    view[half:].copy_(work[:half])


@dataclass
class Binding:
    """An adapter's layers placed on a model: patches in the file's order; module -> reason for those that found no place.

    family: what model it is.   missing: the unmatched modules of parts that the model has, but for those that stand in the file twice.
    idle: matched modules that a merge left as they were, since their strength was 0.
    """

    adapter: Adapter
    patches: list[Patch] = field(default_factory=list)
    matched: list[str] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)
    family: str = "unknown"
    missing: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)

    @property
    def other_family(self) -> str:
        """The family that the file's metadata names, if the model is certainly of another; else ""."""
        said = declared_family(self.adapter.metadata)
        return said if said and self.family in DECLARED and said != self.family else ""

    def strengths(self, index: NameIndex, strength: Strength) -> list[tuple[Patch, Strength]]:
        """Each patch with its strength, the adapter's block strengths in it. Raises StrengthError where one is not defined."""
        share = [1.0] * len(self.patches)
        if self.adapter.blocks is not None:
            share = factors(self.adapter.blocks, index, [(p.key, p.rows) for p in self.patches])
        out = [(p, replace(strength, value=strength.value * factor)) for p, factor in zip(self.patches, share, strict=True)]
        for patch, at in out:
            patch.op.check_strength(at, module=patch.module, file=self.adapter.path)
        return out

    def check(self, strength: Strength, components: Sequence[str] | None = None) -> None:
        """Raises StrengthError if the strength is not defined for one of the layers (of the given components)."""
        for p in self.patches:
            if components is None or p.component in components:
                p.op.check_strength(strength, module=p.module, file=self.adapter.path)


@dataclass
class Adapter:
    """Everything that a file holds, in one convention whatever wrote it.

    blocks: factors on the strength by block of the model, chosen by the user; None: the same everywhere.
    schedule: factor on the diffusion model's strength over the progress of sampling, chosen by the user; None: always 1.
    """

    path: str
    name: str
    dialect: str
    title: str
    reason: str
    metadata: dict[str, str]
    notes: list[str]
    entries: dict[str, Entry]
    unknown: list[str] = field(default_factory=list)
    blocks: BlockWeights | None = None
    schedule: Schedule | None = None

    @property
    def components(self) -> list[str]:
        """Which parts of a model the file adapts: unet, te1, te2, te3."""
        return sorted({e.component for e in self.entries.values()}, key=("unet", "te1", "te2", "te3").index)

    def operations(self) -> dict[str, list[Piece]]:
        """Module -> pieces without a model at hand (layers taken as plain Linear); for inspection."""
        return {name: entry.pieces(None) for name, entry in self.entries.items()}

    def bind(self, index: NameIndex, *, strict: bool = True) -> Binding:
        """Place every layer on the parameters that ``index`` knows.

        Raises ShapeError for a layer that is found but does not fit (the file is for another model), ModelMismatch if ``strict`` and
        nothing matches. Layers that are not found stand in ``unmatched``.
        """
        binding = Binding(self, family=index.family)
        taken: dict[tuple[str, bool], list[Patch]] = {}
        for name, entry in self.entries.items():
            targets = index.resolve(name, entry.clip)
            if not targets:
                binding.unmatched[name] = "no such layer in this model"
                if index.has(entry.component):
                    binding.missing.append(name)
                continue
            placed = self._place(entry, targets, index) if all(index.shapes[t.key] for t in targets) else []
            if not placed:
                binding.unmatched[name] = "the layer has no parameter of this kind"
                binding.missing.append(name)
                continue
            # As in ComfyUI's own loader, a layer that stands in the file under two names is applied once.
            other = next((q.module for p in placed for q in taken.get(_kind(p), ()) if _meet(p, q)), None)
            if other is not None:
                binding.unmatched[name] = f"the same layer as {other}, applied once"
                continue
            for p in placed:
                taken.setdefault(_kind(p), []).append(p)
            binding.patches += placed
            binding.matched.append(name)
        if strict and not binding.matched:
            raise ModelMismatch(
                "Nothing in this file belongs to the model", file=self.path,
                found=f"{len(self.entries)} layers for {guess_family(self.entries)}, e.g. {next(iter(self.entries))}",
                expected=f"layers of {index.family}", hint="Choose an adapter that was trained for this kind of model.",
            )
        return binding

    def _place(self, entry: Entry, targets: list[Target], index: NameIndex) -> list[Patch]:
        shapes = index.shapes
        rows = [t.rows[1] if t.rows else shapes[t.key][0] for t in targets]
        # A layer that is one in the file and several in the model is seen by the reader as one.
        shape = (sum(rows), *shapes[targets[0].key][1:])
        out: list[Patch] = []
        for piece in entry.pieces(shape):
            begin, length = piece.rows or (0, shape[0])
            seen = (length, *shape[1:]) if piece.param == "weight" else (length,)
            piece.op.check_shape(seen, module=entry.module, file=self.path)
            at = 0
            for target, height in zip(targets, rows, strict=True):
                low, high = max(begin, at), min(begin + length, at + height)
                at += height
                if low >= high:
                    continue
                key = target.key if piece.param == "weight" else bias_key(target.key)
                if key not in shapes:
                    continue
                op = piece.op
                if (low, high) != (begin, begin + length):
                    op = op.rows_slice(low - begin, high - low, module=entry.module)
                start = low - (at - height) + (target.rows[0] if target.rows else 0)
                whole = start == 0 and high - low == shapes[key][0]
                swap = target.swap_halves and not (isinstance(op, LayerRotation) and op.side == "in" and op.row_scale is None)
                out.append(Patch(entry.module, key, op, entry.component, None if whole else (start, high - low), swap))
        return out


def _kind(patch: Patch) -> tuple[str, bool]:
    return patch.key, isinstance(patch.op, LayerRotation)


def _meet(one: Patch, other: Patch) -> bool:
    """Whether two patches of one parameter have rows in common."""
    if one.rows is None or other.rows is None:
        return True
    return one.rows[0] < sum(other.rows) and other.rows[0] < sum(one.rows)


def bias_key(key: str) -> str:
    """The bias beside a weight: ``x.weight`` -> ``x.bias``, ``x.in_proj_weight`` -> ``x.in_proj_bias``."""
    return key[: -len("weight")] + "bias" if key.endswith("weight") else key


def load_adapter(path: str | os.PathLike, options: ReadOptions | None = None) -> Adapter:
    """Read an OFT file (or a PEFT folder) of any dialect.

    Raises FileError (missing, damaged, pickle not allowed), FormatError (not OFT; says what it is), ShapeError, ValueFault (NaN).
    """
    options = options or ReadOptions()
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise FileError("There is no such file", file=path)
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt"):
        return read_tensors(_read_pickle(path, options), name=str(path), config=_neighbour_config(path), options=options)
    with _opened(path) as file:
        stored = _Stored(file, path)
        return read_tensors(stored, dict(file.metadata() or {}), name=str(path), config=_neighbour_config(path), options=options)


#: What PEFT, diffusers and transformers call the file in a folder that they save.
_SAVED_AS = (
    "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors",
    "adapter_model.bin", "diffusion_pytorch_model.bin", "pytorch_model.bin",
)


def _in_folder(folder: Path) -> Path:
    """The one file in a saved folder. Raises FileError, which names the folders below that hold one."""
    inside = [p for n in _SAVED_AS if (p := folder / n).is_file()]
    if inside:
        return inside[0]
    below = sorted(p.parent.name for n in _SAVED_AS for p in folder.glob(f"*/{n}"))
    raise FileError(
        "The folder holds no adapter", file=folder, found=f"folders with one: {', '.join(below[:10])}" if below else None,
        expected="adapter_model.safetensors in it", hint="Choose one of these folders." if below else None,
    )


class _Stored(Mapping):
    """The tensors of an open safetensors file, each read when it is asked for: a saved model may lie around the adapter."""

    def __init__(self, file: safe_open, path: Path):
        self._file, self._path = file, path
        self._keys = dict.fromkeys(file.keys())

    def __getitem__(self, key: str) -> Tensor:
        try:
            # A copy: the library's tensors are windows into the file, which may be written over while they live.
            return self._file.get_tensor(key).clone()
        except (SafetensorError, OSError, ValueError, AttributeError, TypeError) as error:  # also types that torch does not have
            raise FileError("A tensor of the file cannot be read", file=self._path, module=key, found=str(error)) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        with open(path, "rb") as f:
            head = f.read(4)
        kind = "a pickle or zip file" if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04") else f"{path.stat().st_size} bytes"
        raise FileError(
            "The file is damaged or not a safetensors file", file=path, found=f"{kind} ({error})",
            expected="a complete safetensors file", hint="Download or copy it again.",
        ) from error


#: What torch's unpickler is seen to raise for damaged files, beside its own refusals.
_UNPICKLING = (
    pickle.UnpicklingError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError, struct.error,
)


def _read_pickle(path: Path, options: ReadOptions) -> dict[str, Tensor]:
    if not options.allow_pickle:
        raise FileError(
            "This is a pickle file, which can run code when it is read", file=path, expected="a safetensors file",
            hint="If you trust it, allow pickles explicitly (--allow-pickle); it is read with weights_only.",
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNPICKLING as error:
        what = "The pickle is damaged or holds more than tensors, and is refused"
        if not isinstance(error, pickle.UnpicklingError):
            what = "The file is damaged or not a pickle"
        reason = (str(error).splitlines() or [""])[0]
        raise FileError(what, file=path, found=reason or type(error).__name__) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise FormatError("The pickle holds no state dict", file=path, found=type(state).__name__)
    return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}


def _neighbour_config(path: Path) -> dict | None:
    """``adapter_config.json`` of an OFT adapter or a relative's in the same folder, else None."""
    config = path.parent / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        content = json.loads(config.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError("The adapter_config.json beside the file cannot be read", file=config, found=str(error)) from error
    if isinstance(content, dict) and content.get("peft_type") in PEFT_TYPES:
        return content
    return None


@full_precision()
def read_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    name: str = "memory",
    config: Mapping[str, object] | None = None,
    options: ReadOptions | None = None,
) -> Adapter:
    """The same from tensors in memory. metadata: the safetensors header's; config: PEFT's adapter_config, if there is one."""
    metadata = dict(metadata or {})
    context = Context(name, metadata, None, options or ReadOptions())
    kohya_names = any(k.startswith(("lora_", "oft_unet_", "oftv2_", "lycoris_")) for k in tensors)
    context.peft = peft_reason(tensors, context, config is not None and not kohya_names)
    context.config = config if context.peft else None
    said = (context.config or {}).get("base_model_name_or_path")
    if isinstance(said, str) and said.strip():
        metadata.setdefault(PEFT_BASE, said.strip())
    modules, unknown = group(tensors, context)
    clip = loose_clip(modules)
    entries: dict[str, Entry] = {}
    reasons: dict[str, str] = {}
    for module in modules.values():
        _check_values(module)
        found = detect(module)
        if found is None:
            unknown += [f"{module.name}.{s}" for s in module.tensors if s not in ("alpha", "I")]
            continue
        dialect, reason = found
        reasons.setdefault(dialect, reason)
        entries[module.name] = Entry(module, dialect, clip)
    count = Counter(e.dialect for e in entries.values() if e.dialect != "F5d")
    if not count:
        raise FormatError(
            f"This is not an OFT file but {what_is_it(list(tensors))}", file=name,
            found=f"{len(tensors)} tensors" + (f", e.g. {next(iter(tensors))}" if tensors else ""),
            expected="OFT layers (oft_blocks, oft_R, oft_r, oft_diag, boft_R ...)",
        )
    dialect = count.most_common(1)[0][0]
    for entry in entries.values():
        for piece in entry.make(None):  # shape faults and remarks show now, not at the first use; kept are those of real shapes
            piece.op.check_values(module=entry.module, file=name)
    if unknown:
        context.note(f"{len(unknown)} keys are not understood and not applied, e.g. {unknown[0]}")
    return Adapter(
        name, Path(name).name, dialect, DIALECTS[dialect].title, reasons[dialect], metadata, context.notes, entries, unknown
    )


#: Metadata: what PEFT's config calls the base model.
PEFT_BASE = "peft_base_model"
_READABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite in float32."""
    plain = tensor if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) else tensor.float()
    # A finite sum proves it in a tenth of the time; one that is not may only be too large.
    return math.isfinite(plain.sum(dtype=torch.float32)) or bool(torch.isfinite(plain).all())


def _check_values(module: Module) -> None:
    for suffix, tensor in module.tensors.items():
        if tensor.dtype not in _READABLE:
            raise module.format_error("A tensor is of a type that adapters do not have", f"{suffix}: {tensor.dtype}", "floating-point numbers")
        if tensor.is_floating_point() and not _finite(tensor):
            raise ValueFault(
                "The file holds numbers that are not finite", file=module.context.file, module=f"{module.name}.{suffix}",
                found="NaN or Inf", expected="finite numbers", hint="The training run broke; use an earlier save.",
            )


