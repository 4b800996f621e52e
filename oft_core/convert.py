"""An adapter in another tool's dialect, or as a LoRA: exactly where that can be, else with the error measured."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .adapter import Adapter, Binding
from .apply import powered
from .atomic import all_or_none
from .changed import of_adapter
from .constraint import Strength
from .diff import Diff
from .errors import FormatError
from .extract import Fit, assessed, fit
from .formats.common import side_length
from .formats.write import WRITERS, lora_parts, peft_block_size, write_adapter
from .formats.write_beside import BaseWeights
from .layer import LayerRotation
from .limits import multiplier
from .names import NameIndex
from .planes import planes_at
from .rotation import pack_skew
from .stack import Share, blend
from .tensors import full_precision

#: The dialect that is a folder; every other one is a file.
FOLDER = "peft"
#: Directions beyond the wanted ones that the randomised method works with.
_OVERSAMPLED = 8


@full_precision()
def convert(
    adapter: Adapter,
    index: NameIndex,
    target: str | os.PathLike,
    dialect: str,
    *,
    base: BaseWeights | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    strength: Strength | None = None,
) -> Path:
    """Write an adapter in one of ``WRITERS``; returns the file. It holds exactly the same rotations, or there is none.

    index: of the model that the adapter is for.   target: a file; for ``peft`` its name without ending is the folder.
    base: parameter key -> the model's own value, for dialects that keep whole values where the adapter has differences, or the
    other way round.   dtype: of generators and scales.   strength: baked in, with the adapter's block strengths; 1 if None. Raises
    FormatError with the reason where that cannot be, and what `bind` raises for another model.
    """
    layers, beside = _settled(_bound(adapter, index), index, strength or Strength())
    return _written(layers, beside, index, target, dialect, base, metadata, dtype)


@full_precision()
def convert_near(
    adapter: Adapter,
    index: NameIndex,
    target: str | os.PathLike,
    dialect: str,
    *,
    base: BaseWeights,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    strength: Strength | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Path, list[Fit]]:
    """As `convert`; where that cannot be, every layer as the nearest rotation that the dialect holds on this base, with its error.

    Returns the file and one Fit a layer, [] if it is exact. progress: wraps the layers' keys, such as a bar.
    """
    at = strength or Strength()
    binding = _bound(adapter, index)
    try:
        layers, beside = _settled(binding, index, at)
        return _written(layers, beside, index, target, dialect, base, metadata, dtype), []
    except FormatError as error:
        exact = error
    writer = WRITERS.get(dialect)
    if writer is None:
        raise exact
    wanted = Counter(p.op.block for p in binding.patches if isinstance(p.op, LayerRotation)).most_common(1)
    if not wanted:
        raise exact
    layers, beside, fits = {}, {}, []
    changed = of_adapter(binding, index, base, at)
    for key in progress(changed):
        before, after = base(key).float(), changed[key]()
        if index.spelling(key) is None or before.ndim < 2:
            beside[key] = Diff(after - before)
            continue
        length = side_length(before.shape, writer.side)
        size = peft_block_size(length, wanted[0][0])
        while writer.small_blocks and size * size > length:
            size = next(b for b in range(size - 1, 0, -1) if length % b == 0)
        layers[key] = fit(before, after, writer.side, size, rescale=writer.rows)
        fits.append(assessed(key, before, after, layers[key]))
    return _written(layers, beside, index, target, dialect, base, metadata, dtype), fits


def place_of(target: str | os.PathLike, dialect: str) -> Path:
    """The file that is written; for ``peft`` the folder, of the file's name without ``.safetensors``."""
    target = Path(target)
    return target.with_suffix("") if dialect == FOLDER and target.suffix == ".safetensors" else target


def _written(
    layers: Mapping[str, LayerRotation], beside: Mapping[str, Diff], index: NameIndex, target: str | os.PathLike, dialect: str,
    base: BaseWeights | None, metadata: Mapping[str, str] | None, dtype: torch.dtype,
) -> Path:
    target = place_of(target, dialect)
    if dialect in WRITERS and WRITERS[dialect].cayley_only:
        layers = {key: _as_cayley(layer, Strength()) if layer.kind == "expm" else layer for key, layer in layers.items()}
    return write_adapter(layers, index, target, dialect, beside=beside, base=base, metadata=metadata, dtype=dtype)


def _bound(adapter: Adapter, index: NameIndex) -> Binding:
    binding = adapter.bind(index)
    if binding.unmatched:
        raise FormatError(
            "Not every layer of this adapter belongs to this model", module=next(iter(binding.unmatched)),
            hint="Choose the model (and its text encoders) that it was made for.",
        )
    return binding


@full_precision()
def blended(
    adapters: Sequence[Adapter],
    index: NameIndex,
    target: str | os.PathLike,
    dialect: str | None = None,
    *,
    strengths: Sequence[Strength],
    keep_angles: bool = False,
    base: BaseWeights | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Path, str, float]:
    """Write the average of several adapters, see `stack.blend`, as one file; returns it, its dialect and the size of what is left out.

    Left out is what a truncated series stretches: max |M^T M - 1| of the average, which is written as a rotation; 0 for exact ones.

    dialect: one of ``WRITERS``; None: OFT v2 with extras for the input side, ComfyUI's for the output side. Raises as `convert`, and
    StackError for layers that have no average.
    """
    shares = [
        Share(patch, at, adapter.name)
        for adapter, at in zip(adapters, strengths, strict=True) for patch in _bound(adapter, index).patches
    ]
    layers: dict[str, LayerRotation] = {}
    beside: dict[str, Diff] = {}
    for patch in blend(shares, len(adapters), index.shapes, keep_angles=keep_angles):
        place = layers if isinstance(patch.op, LayerRotation) else beside
        if patch.key in place and not patch.rows:
            raise FormatError(
                "These adapters turn different sides, and no file holds both", module=patch.module, hint="Stack them in the graph instead."
            )
        if patch.rows or patch.swap_halves:
            raise FormatError("The average has a layer that cannot be written in one file", module=patch.module, found="part of a fused layer")
        place[patch.key] = patch.op
    stretched = max((layer.orthogonality_error() for layer in layers.values() if layer.kind == "matrix"), default=0.0)
    layers = {key: _as_cayley(layer, Strength()) if layer.kind == "matrix" else layer for key, layer in layers.items()}
    if dialect is None:
        sides = {layer.side for layer in layers.values()}
        if len(sides) > 1:
            raise FormatError("These adapters turn different sides, and no file holds both", hint="Stack them in the graph instead.")
        rows = any(layer.row_scale is not None for layer in layers.values())
        dialect = "oft_v2_plus" if sides == {"in"} else "lycoris" if rows else "comfy"
    return _written(layers, beside, index, target, dialect, base, metadata, dtype), dialect, stretched


# ---------------------------------------------------------------- strengths


def _settled(binding: Binding, index: NameIndex, strength: Strength) -> tuple[dict[str, LayerRotation], dict[str, Diff]]:
    """What is left to write of an adapter at a strength, parameter key -> layer. Raises FormatError where that is no rotation."""
    layers: dict[str, LayerRotation] = {}
    beside: dict[str, Diff] = {}
    for patch, at in binding.strengths(index, strength):
        place = layers if isinstance(patch.op, LayerRotation) else beside
        if patch.rows or patch.swap_halves or patch.key in place:
            raise FormatError("This adapter has a layer that cannot be written in another dialect", module=patch.module)
        if at.value == 0:
            continue
        place[patch.key] = baked(patch.op, at, patch.module)
    return layers, beside


def baked(op: LayerRotation | Diff, at: Strength, module: str) -> LayerRotation | Diff:
    """The same change as an operation of strength 1. Raises FormatError where it is none of the same kind."""
    if at.value == 1 and at.coft == "file" and at.mode in ("rotation", "geodesic"):
        return op
    if isinstance(op, Diff):
        if op.whole:
            raise FormatError("A parameter that is stored whole has no strength of its own", module=module)
        return replace(op, delta=op.delta * at.value)
    reason = None
    if at.mode not in ("rotation", "geodesic"):
        reason = f"mode '{at.mode}' at this strength is no rotation"
    elif not op.exact or op.subspace or op.added is not None or op.norm_of or op.size is not None or op.butterfly and at.mode == "geodesic":
        reason = "this kind of layer at another strength has no file of its own kind"
    elif at.value < 0 and op.row_scale is not None and op.side == "out":
        reason = "at a negative strength its row factors act before the rotation"
    if reason is not None:
        raise FormatError(f"The strength cannot be baked in: {reason}", module=module)
    return _as_cayley(op, at)


def _as_cayley(op: LayerRotation, at: Strength) -> LayerRotation:
    """The same matrices by Cayley's transform of another generator, limits and strength in it."""
    rows, cols = (powered(f, at.value) if at.value != 1 else f for f in (op.row_scale, op.col_scale))
    if op.kind == "cayley" and at.mode == "rotation":
        by = (multiplier(op, at, "cpu") * at.value).expand(op.stages, op.stored).unsqueeze(-1)
        generator = (op.generator.double() * by).float()
    else:
        planes, _, angle = planes_at(op, at, "cpu")
        q = planes.apply(torch.zeros_like(angle), torch.tan(angle / 2))
        generator = pack_skew(q).float()
    return replace(
        op, kind="cayley", generator=generator, constraint=None, clip=None, row_scale=rows, col_scale=cols, of_layer=None, core_alpha=None,
        _cache={},
    )


# ---------------------------------------------------------------- LoRA


@dataclass(frozen=True)
class LowRank:
    """One layer of a LoRA: its rank, and |change - LoRA| / |change|.   size: |change|."""

    key: str
    rank: int
    residual: float
    size: float


@full_precision()
def to_lora(
    adapter: Adapter,
    index: NameIndex,
    target: str | os.PathLike,
    *,
    base: BaseWeights,
    rank: int = 32,
    error: float | None = None,
    strength: Strength | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Path, list[LowRank]]:
    """Write what an adapter changes of this base as a LoRA of kohya's names, which every UI reads; returns file and layers.

    Each change is cut to its largest singular values: ``rank`` of them (found by a randomised method where these are few), or with ``error`` as few as leave at most that share of the
    change. Biases and norms are differences (``diff_b``, ``diff``). A rotation is not of low rank, so a residual remains; it is
    right on this base only. Raises ValueError for a rank below 1 or an error outside of 0 ... 1, else as `convert`.
    """
    if rank < 1 or error is not None and not 0 < error < 1:
        raise ValueError("rank must be 1 or more, error between 0 and 1")
    binding = _bound(adapter, index)
    tensors: dict[str, Tensor] = {}
    layers = []
    changed = of_adapter(binding, index, base, strength or Strength())
    for key in progress(changed):
        delta = changed[key]() - base(key).float()
        for name, part in lora_parts(key, delta, index):
            if name.endswith((".diff", ".diff_b")):
                tensors[name] = part.to(dtype)
                continue
            up, down, left = _low_rank(part.flatten(1), rank, error)
            tensors[f"{name}.lora_up.weight"] = up.view(*up.shape, *[1] * (part.ndim - 2)).to(dtype).contiguous()
            tensors[f"{name}.lora_down.weight"] = down.view(len(down), *part.shape[1:]).to(dtype).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
            layers.append(LowRank(name, len(down), left, float(part.norm())))
    if not tensors:
        raise FormatError("At this strength the adapter changes nothing", file=adapter.path)
    target = Path(target)
    all_or_none({target: lambda p: save_file(tensors, p, dict(metadata or {}) or None)})
    return target, layers


def _low_rank(delta: Tensor, rank: int, error: float | None) -> tuple[Tensor, Tensor, float]:
    """up (out, r), down (r, in) and the share of the change that they leave."""
    size = float(delta.norm())
    if size == 0:
        return delta.new_zeros(len(delta), 1), delta.new_zeros(1, delta.shape[1]), 0.0
    if error is None and rank + _OVERSAMPLED < min(delta.shape) // 4:
        # Few of many directions: a randomised method, a hundred times faster and as good to a per cent or so.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, q=rank + _OVERSAMPLED, niter=4)
        root = s[:rank].sqrt()
        up, down = u[:, :rank] * root, root.unsqueeze(1) * v[:, :rank].t()
    else:
        up, down = _directions(delta.double(), rank, error)
    return up, down, float((delta - up @ down).norm()) / size


def _directions(delta: Tensor, rank: int, error: float | None) -> tuple[Tensor, Tensor]:
    """The largest singular directions of a float64 matrix by the eigenvectors of its smaller Gram matrix."""
    if len(delta) > delta.shape[1]:
        up, down = _directions(delta.t(), rank, error)
        return down.t(), up.t()
    values, vectors = torch.linalg.eigh(delta @ delta.t())
    s = values.flip(0).clamp_min(0).sqrt()
    r = min(rank, int((s > s[0] * 1e-7).sum()))
    if error is not None:
        rest = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm()  # what is left from each value on
        r = max(1, int((rest > error).sum()))
    root, u = s[:r].sqrt(), vectors.flip(1)[:, :r]
    return (u * root).float(), ((u.t() @ delta) / root.unsqueeze(1)).float()


# ---------------------------------------------------------------- in words


def left_out(parts: Iterable[tuple[float, float]]) -> float:
    """Share of the whole change that is left out, 0 to 1 or so. parts: that share, and the size of the change, of every layer."""
    parts = list(parts)
    whole = sum(size**2 for _, size in parts)
    return math.sqrt(sum((share * size) ** 2 for share, size in parts) / whole) if whole else 0.0


def about_lora(layers: Sequence[LowRank]) -> str:
    """What is left out, in words."""
    left = left_out((x.residual, x.size) for x in layers)
    worst = max(layers, key=lambda x: x.residual, default=None)
    ranks = sorted(x.rank for x in layers)
    if worst is None:
        return "Only biases and norms."
    return (
        f"Ranks {ranks[0]} to {ranks[-1]}; of the change {100 * left:.1f} % is left out in all, at most {100 * worst.residual:.1f} % ({worst.key})."
    )


def about_fits(fits: Sequence[Fit]) -> str:
    """What is left out, in words."""
    left = left_out((f.remainder, f.size) for f in fits)
    worst = max(fits, key=lambda f: f.remainder)
    return f"Of the change {100 * left:.1f} % is left out in all, at most {100 * worst.remainder:.1f} % ({worst.key})."
