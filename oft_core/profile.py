"""What a file does layer by layer and block by block: the numbers behind `pictures`, tables and JSON.

`measure` answers for a whole file without decomposing most of it; here every block is decomposed, which takes some seconds for a large
file. Energies need the weights of a base model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter, Binding
from .constraint import Strength
from .errors import printable
from .layer import LayerRotation
from .measure import layer_angles
from .tensors import full_precision
from .threads import undivided

#: Degrees. A layer whose largest plane turns less has learnt nothing that a picture shows.
NOTHING = 0.05
#: Rows of a weight that its energy is computed over; of larger ones a sample is taken.
ENERGY_ROWS = 1024
#: Largest joint block of two files whose rotations are compared.
JOINT = 1024

_NUMBERED = re.compile(r"(?:^|[._])([a-z]+(?:_[a-z]+)*?)[._](\d+)(?=[._]|$)")
_SKIPPED = re.compile(
    r"^(lora_unet_|lora_te\d?_|lycoris_|oft_unet_|oft_te\d?_|text_model_|encoder_|"
    r"(unet|diffusion_model|transformer|base_model|model|text_model|encoder|te\d?)\.)"
)


@dataclass(frozen=True)
class LayerProfile:
    """One layer. name: as the file has it.   component: the part of the model.   group, number: the list of blocks that the layer is in
    and its place there, number None outside of lists.   side: ``in`` or ``out``.   block: size of its blocks.

    largest: degrees of every block's largest plane at strength 1, limits applied, float64 (count,).   planes: degrees of all planes,
    sorted.   share: used part of the file's COFT radius, None without one.   gain: smallest and largest row factor, None without.
    """

    name: str
    component: str
    group: str
    number: int | None
    side: str
    block: int
    largest: Tensor
    planes: Tensor
    share: float | None = None
    gain: tuple[float, float] | None = None

    @property
    def top(self) -> float:
        """The largest angle, degrees."""
        return float(self.largest.max())

    @property
    def mean(self) -> float:
        """Mean over all planes, degrees."""
        return float(self.planes.mean())

    @property
    def learnt(self) -> bool:
        return self.top >= NOTHING

    def to_dict(self) -> dict:
        """Plain values, with the largest angle of every block."""
        return {
            "name": self.name, "component": self.component, "group": self.group, "number": self.number, "side": self.side,
            "block": self.block, "blocks": len(self.largest), "largest": self.top, "mean": self.mean, "learnt": self.learnt,
            "radius_in_use": self.share, "gain": self.gain, "angles": [round(a, 4) for a in self.largest.tolist()],
        }


@full_precision()
def profile(adapter: Adapter, binding: Binding | None = None) -> list[LayerProfile]:
    """All rotations of a file in the order of the model, as far as names tell: part, list, number, name.

    binding: names and slices as in that model; None: as in the file.
    """
    with undivided():
        out = [_profiled(*found) for found in _rotations(adapter, binding)]
    first = {key: i for i, key in reversed(list(enumerate((p.component, p.group) for p in out)))}
    return sorted(out, key=lambda p: (first[p.component, p.group], -1 if p.number is None else p.number, _natural(p.name)))


def _rotations(adapter: Adapter, binding: Binding | None) -> Iterator[tuple[str, str, LayerRotation]]:
    if binding is not None:
        for patch in binding.patches:
            if isinstance(patch.op, LayerRotation) and not patch.key.endswith("bias"):
                name = patch.key.removesuffix(".weight")
                yield (name if patch.rows is None else f"{name}[{patch.rows[0]}:{sum(patch.rows)}]"), patch.component, patch.op
        return
    for module, pieces in adapter.operations().items():
        ops = [p.op for p in pieces if p.param == "weight" and isinstance(p.op, LayerRotation)]
        for i, op in enumerate(ops):
            yield (module if len(ops) == 1 else f"{module}[{i}]"), adapter.entries[module].component, op


def _profiled(name: str, component: str, layer: LayerRotation) -> LayerProfile:
    angles = torch.rad2deg(layer_angles(layer))  # (stages, stored, b)
    largest = angles.amax((0, 2)).expand(layer.count)
    group, number = place(name)
    gain = None if layer.row_scale is None or layer.norm_of else (float(layer.row_scale.min()), float(layer.row_scale.max()))
    share = None if layer.constraint is None else float(layer.constraint.use())
    # Every plane has two equal values.
    planes = angles.flatten().sort().values
    return LayerProfile(name, component, group, number, layer.side, layer.block, largest, planes, share, gain)


def place(name: str) -> tuple[str, int | None]:
    """The list of blocks that a layer's name says it is in, and its number there: ``("double_blocks", 3)``; ("other", None) if none."""
    rest = name
    while (cut := _SKIPPED.sub("", rest, count=1)) != rest:
        rest = cut
    found = _NUMBERED.search(rest)
    return (found[1], int(found[2])) if found else ("other", None)


def _natural(name: str) -> list:
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)]


def table(layers: Sequence[LayerProfile]) -> str:
    """One line a layer: name, side, number and size of its blocks, angles in degrees, used radius, row factors."""
    wide = max((len(p.name) for p in layers), default=0)
    lines = [f"{'layer':{wide}}  side  blocks     largest     mean  radius  row factors"]
    for p in layers:
        share = "" if p.share is None else "full" if p.share >= 1 else f"{100 * p.share:.0f} %"
        gain = "" if p.gain is None else f"{p.gain[0]:.3f} to {p.gain[1]:.3f}"
        blocks = f"{len(p.largest)} x {p.block}"
        lines.append(f"{p.name:{wide}}  {p.side:4}  {blocks:9} {p.top:8.3f} {p.mean:8.3f}  {share:6}  {gain}".rstrip())
    return "\n".join(printable(line, 1000) for line in lines)


# --- two files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    """Two files' rotations of one layer. angle: largest angle of the rotation from one to the other, degrees, (joint blocks,).

    likeness: cosine between their skew parts: 1 for turns in the same direction, 0 for unrelated ones, -1 for opposite ones.
    reason: why they cannot be compared; the others are then None.
    """

    name: str
    angle: Tensor | None = None
    likeness: float | None = None
    reason: str = ""


@full_precision()
def between(first: Adapter, second: Adapter, bind: Callable[[Adapter], Binding] | None = None) -> list[Between]:
    """The layers that both files turn, by name; bind: places a file on the model that both are for, if their names differ."""
    mine, theirs = ({name: op for name, _, op in _rotations(adapter, bind(adapter) if bind else None)} for adapter in (first, second))
    return [_between(name, mine[name], theirs[name]) for name in sorted(mine.keys() & theirs.keys(), key=_natural)]


def _between(name: str, a: LayerRotation, b: LayerRotation) -> Between:
    if a.subspace or b.subspace:
        return Between(name, reason="rotations of a subspace are not compared")
    if a.side != b.side or a.axis != b.axis:
        return Between(name, reason=f"one turns {a.axis} {a.side}puts, the other {b.axis} {b.side}puts")
    if a.butterfly or b.butterfly or a.size or b.size:
        return Between(name, reason="butterflies and cut blocks are not compared")
    size = math.lcm(a.block, b.block)
    if size > JOINT or a.axis % size:
        return Between(name, reason=f"blocks of {a.block} and {b.block} have no common block")
    one, other = (_joint(layer, size) for layer in (a, b))
    turn = one.transpose(-1, -2) @ other
    values = torch.linalg.eigvals(turn)
    angle = torch.rad2deg(values.angle().abs().amax(-1))
    logs = [_skew(m) for m in (one, other)]
    norm = (logs[0].norm() * logs[1].norm()).clamp_min(1e-30)
    return Between(name, angle, float((logs[0] * logs[1]).sum() / norm))


def _joint(layer: LayerRotation, size: int) -> Tensor:
    """Blocks of `size`, float64 (n, size, size), at strength 1."""
    blocks = layer.build(Strength()).matrices[0].double().expand(layer.count, layer.block, layer.block)
    per = size // layer.block
    return torch.stack([torch.block_diag(*blocks[i : i + per]) for i in range(0, layer.count, per)])


def _skew(m: Tensor) -> Tensor:
    return (m - m.transpose(-1, -2)) / 2


def table_between(found: Sequence[Between]) -> str:
    """One line a layer: the largest angle from one file's rotation to the other's, and their likeness."""
    wide = max((len(b.name) for b in found), default=0)
    lines = [f"{'layer':{wide}}  from A to B  likeness"]
    for b in found:
        text = b.reason if b.angle is None else f"{float(b.angle.max()):11.3f}  {b.likeness:+8.3f}"
        lines.append(f"{b.name:{wide}}  {text}")
    return "\n".join(printable(line, 1000) for line in lines)


# --- on a model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Energy:
    """Hyperspherical energy of a weight's neurons (rows), as mean over pairs of 1 / distance on the unit sphere.

    error: standard error of the mean where it is of a sample of rows; 0 where it is exact.
    """

    value: float
    error: float = 0.0


def energy(weight: Tensor, rows: int = ENERGY_ROWS, seed: int = 0) -> Energy:
    """The energy that OFT keeps (Liu et al. 2018, arXiv 1805.09298; Qiu et al. 2023, arXiv 2306.07280), of a weight (out, ...).

    Computed in float64. More than `rows` neurons are sampled, the same ones for every weight of a size and seed.
    """
    flat = weight.detach().flatten(1).double()
    if sampled := len(flat) > rows:
        chosen = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))[:rows]
        flat = flat[chosen.to(flat.device)]
    unit = torch.nn.functional.normalize(flat, dim=1)
    i, j = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    distance = (2 - 2 * (unit @ unit.T)[i, j]).clamp_min(1e-12).sqrt()
    inverse = 1 / distance
    # Pairs that share a neuron are not independent: the error is that of the neurons' own means.
    error = float(_means(inverse, i, j, len(unit)).std() / math.sqrt(len(unit))) if sampled else 0.0
    return Energy(float(inverse.mean()), error)


def _means(values: Tensor, i: Tensor, j: Tensor, count: int) -> Tensor:
    total = torch.zeros(count, dtype=values.dtype, device=values.device)
    total.index_add_(0, i, values).index_add_(0, j, values)
    return total / (count - 1)


@dataclass(frozen=True)
class Kept:
    """What a layer's change keeps of a weight. energy: before and after.   norms: largest relative change of a neuron's norm.

    moved: size of the change relative to the weight (Frobenius).
    """

    name: str
    energy: tuple[Energy, Energy]
    norms: float
    moved: float


def table_kept(found: Sequence[Kept]) -> str:
    """One line a weight: energy before and after with the sample's error, change of the largest neuron norm, size of the change."""
    wide = max((len(k.name) for k in found), default=0)
    lines = [f"{'weight':{wide}}  energy before      after  sampled +-  norms     moved"]
    for k in found:
        before, after = k.energy
        lines.append(
            f"{k.name:{wide}}  {before.value:13.6f} {after.value:10.6f}  {after.error:10.6f}  {100 * k.norms:6.3f} % {100 * k.moved:6.2f} %"
        )
    return "\n".join(printable(line, 1000) for line in lines)


def kept(binding: Binding, weight_of: Callable[[str], Tensor], names: Sequence[str] | None = None) -> Iterator[Kept]:
    """For every weight that a file turns: its geometry before and after, at strength 1.

    weight_of: key -> the base's weight, any floating dtype; computed in float32.   names: only these keys.
    """
    patches: dict[str, list] = {}
    for patch in binding.patches:
        if not patch.key.endswith("bias") and (names is None or patch.key in names):
            patches.setdefault(patch.key, []).append(patch)
    for key, found in patches.items():
        before = weight_of(key).detach().float()
        after = before.clone()
        for patch in found:
            patch.apply_(after, Strength())
        norms = [torch.linalg.vector_norm(w.flatten(1), dim=1) for w in (before, after)]
        change = float(((norms[1] - norms[0]).abs() / norms[0].clamp_min(1e-12)).max())
        moved = float((after - before).norm() / before.norm().clamp_min(1e-12))
        yield Kept(key, (energy(before), energy(after)), change, moved)
