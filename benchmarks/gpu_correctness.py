"""Correctness on the device against float64 arithmetic on the CPU: changed weights, turned activations, gradients of a training step.

The reference takes the rotations as built on the CPU and multiplies whole matrices in float64, without the library's in-place and
chunked kernels. ``error`` is ||got - want|| / ||want - unchanged||. ``roundings`` is ||got - want|| over what is lost when the exact
result is rounded once to the same dtype (weights), or, both relative to their outputs, over the unchanged layer's own error on the
same input (activations): near 1 means that nothing but that one rounding was lost, however small the change.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from gpu_common import DTYPES, EIGHT_BIT, Section, Setup, table
from safetensors.torch import load_file
from torch import Tensor, nn

from oft_core import (
    Constraint,
    Diff,
    LayerRotation,
    NameIndex,
    Patch,
    ReadOptions,
    Strength,
    StrengthError,
    load_adapter,
)
from oft_core.activations import Change, Pipeline, arriving_delta, terms_of
from oft_core.blocks import row_norms
from oft_core.layer import Built, Factors
from oft_core.rotation import cayley, unpack_skew
from oft_core.training import OFTConfig, RotationBank

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
MODES = ("rotation", "geodesic", "linear")
STRENGTHS = (1.0, 0.5, -1.0)
ALL_DTYPES = {**DTYPES, **EIGHT_BIT}
#: Largest ``roundings`` by (what, dtype) that pass. Float32 sums of b products lose a few roundings more than the last one.
BOUNDS = {
    "weight": {"fp32": 16.0, "fp16": 1.05, "bf16": 1.05, "fp8 e4m3": 1.05, "fp8 e5m2": 1.05},
    "activations": {"fp32": 16.0, "fp16": 3.0, "bf16": 3.0, "fp8 e4m3": 3.0, "fp8 e5m2": 3.0},
}
#: Largest relative error of a loss's gradient in float32.
GRADIENT_BOUND = 1e-4


# ---------------------------------------------------------------- reference


def turned(x: Tensor, m: Tensor, index: Tensor | None) -> Tensor:
    """Columns of x (size, c) float64 times one block-diagonal stage; the last block may be cut, one block stands for all."""
    b = m.shape[-1]
    y = x if index is None else x[index]
    missing = -len(y) % b
    blocks = F.pad(y, (0, 0, 0, missing)).view(-1, b, x.shape[1])
    y = (m.double() @ blocks).reshape(-1, x.shape[1])[: len(x)]
    if index is None:
        return y
    out = torch.empty_like(y)
    out[index] = y
    return out


def multiplied(flat: Tensor, f: Factors, side: str) -> Tensor:
    """rows * (M flat) * cols in float64, mixed with ``flat``."""

    def scaled(x: Tensor) -> Tensor:
        x = x if f.rows is None else x * f.rows.double().unsqueeze(1)
        return x if f.cols is None else x * f.cols.double().unsqueeze(0)

    work = scaled(flat) if f.inverse else flat
    work = work if side == "out" else work.t()
    for m, index in zip(f.stages, f.permutations or [None] * len(f.stages), strict=True):
        work = turned(work, m, index)
    work = work if side == "out" else work.t()
    work = work if f.inverse else scaled(work)
    return work if f.mix is None else torch.lerp(flat, work, f.mix)


def exact(op: LayerRotation | Diff, weight: Tensor, strength: Strength, built: Built | None, base_norm: Tensor | None) -> Tensor:
    """The changed weight in float64; weight float64 on the CPU, built on the CPU."""
    s = strength.value
    if isinstance(op, Diff):
        delta = op.delta.double().reshape(weight.shape)
        return torch.lerp(weight, delta, s) if op.whole else weight + s * delta
    start, inner = weight, strength
    if op.added is not None:
        gain = 1.0 if strength.mode == "linear" else s
        start = weight + gain * op.added.double().reshape(weight.shape)
        inner = Strength() if strength.mode == "linear" else strength
    flat = start.reshape((weight.numel() // weight.shape[0], weight.shape[0]) if op.memory_view else (weight.shape[0], -1))
    norm = start.flatten(1).norm(dim=1) if op.norm_of == "current" else base_norm
    out = multiplied(flat, op.factors(built, norm, inner, "cpu"), op.side).reshape(weight.shape)
    return torch.lerp(weight, out, s) if op.added is not None and strength.mode == "linear" else out


def exact_patch(patch: Patch, weight: Tensor, strength: Strength, built: Built | None, base_norm: Tensor | None) -> Tensor:
    """``exact`` on the patch's rows, in its own order of them. base_norm: of those rows, in the base's order."""
    start, length = patch.rows or (0, len(weight))
    part, half = weight[start : start + length], length // 2
    order = torch.arange(length).roll(-half) if patch.swap_halves else torch.arange(length)
    changed = exact(patch.op, part[order], strength, built, None if base_norm is None else base_norm[order])
    out = weight.clone()
    out[start + order] = changed
    return out


def rounded(exactly: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of the dtype, as float64."""
    top = torch.finfo(dtype).max
    return exactly.clamp(-top, top).to(dtype).double()


# ---------------------------------------------------------------- comparing


@dataclass
class Worst:
    """The largest errors of one group of comparisons."""

    what: str
    source: str
    dtype: str
    cases: int = 0
    error: float = 0.0
    error_at: str = ""
    roundings: float = 0.0
    roundings_at: str = ""

    def add(self, error: float, roundings: float, where: str) -> None:
        self.cases += 1
        # Not-a-number compares false with everything, and must not pass for that.
        if not error <= self.error:
            self.error, self.error_at = error, where
        if not roundings <= self.roundings:
            self.roundings, self.roundings_at = roundings, where


class Tally:
    """All groups, by what, where the cases come from, and dtype."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str, str], Worst] = {}
        self.refused = 0

    def add(self, what: str, source: str, dtype: str, error: float, roundings: float, where: str) -> None:
        self.groups.setdefault((what, source, dtype), Worst(what, source, dtype)).add(error, roundings, where)


def compare_patch(
    patch: Patch, base: Tensor, setup: Setup, tally: Tally, source: str, name: str, dtypes: dict[str, torch.dtype],
    strengths: list[Strength], x: Tensor | None,
) -> None:
    """One change at every strength and dtype, on the weight and, with ``x`` (tokens, in) float32, on activations."""
    op, device = patch.op, setup.device
    start, length = patch.rows or (0, len(base))
    for strength in strengths:
        try:
            op.check_strength(strength)
        except StrengthError:  # a mode that is not defined for this form, such as powers of a half turn
            tally.refused += 1
            continue
        where = f"{name}, {strength.mode} {strength.value:g}" + ("" if strength.coft == "file" else f", COFT {strength.coft}")
        built, on_device = op.build(strength), op.build(strength, device)
        for label, dtype in dtypes.items():
            weight = rounded(base.double(), dtype).to(dtype)
            before = weight.double()
            norm = row_norms(weight.float()[start : start + length]) if op.needs_base else None
            want = exact_patch(patch, before, strength, built, norm)
            size, lost = (want - before).norm(), (rounded(want, dtype) - want).norm()
            if size == 0:
                continue
            got = weight.to(device, copy=True)
            patch.apply_(got, strength, rotation=on_device, measured=None if norm is None else norm.to(device))
            off = (got.cpu().double() - want).norm()
            tally.add("weight", source, label, float(off / size), float(off / lost) if lost > 0 else 0.0, where)
            if x is not None:
                compare_activations(patch, weight, want, strength, on_device, norm, x, setup, tally, (source, label, where))


def compare_activations(
    patch: Patch, weight: Tensor, want: Tensor, strength: Strength, built: Built | None, norm: Tensor | None, x: Tensor,
    setup: Setup, tally: Tally, labels: tuple[str, str, str],
) -> None:
    """The unchanged layer on turned inputs, its output turned, against the exactly changed weight."""
    op, device = patch.op, setup.device
    if isinstance(op, LayerRotation) and op.memory_view:
        return
    rows = slice(patch.rows[0], sum(patch.rows)) if patch.rows else slice(0, len(weight))
    if isinstance(op, LayerRotation) and op.norm_of == "current":
        delta, gain = arriving_delta(op, strength)
        arriving = weight[rows].float()
        norm = (arriving if delta is None else arriving + gain * delta.reshape(arriving.shape)).norm(dim=1)
    if norm is not None and patch.swap_halves:
        norm = norm.roll(-(len(norm) // 2))
    dtype = torch.bfloat16 if weight.dtype.itemsize == 1 else weight.dtype
    inputs = x.to(dtype)
    frozen, given = weight.to(device).to(dtype), inputs.to(device)
    terms = terms_of(op, strength, built, norm, device)
    pipeline = Pipeline([Change(rows.start, rows.stop, terms, patch.swap_halves)], len(weight))
    got = pipeline(given.unsqueeze(0), lambda v: F.linear(v, frozen), lambda _: None, -1)[0]
    exactly, plain = inputs.double() @ want.t(), inputs.double() @ weight.double().t()
    own = (F.linear(given, frozen).cpu().double() - plain).norm() / plain.norm()
    off = (got.cpu().double() - exactly).norm()
    source, label, where = labels
    size = (exactly - plain).norm()
    tally.add("activations", source, label, float(off / size), float(off / exactly.norm() / own), where)


# ---------------------------------------------------------------- cases


def golden_module() -> ModuleType:
    """tests/golden/check.py, which knows the cases."""
    if "golden_check" not in sys.modules:
        spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["golden_check"] = module
        spec.loader.exec_module(module)
    return sys.modules["golden_check"]


def golden_patches(case: Path, info: dict) -> Iterator[tuple[Patch, Tensor]]:
    base = load_file(case / "base.safetensors")
    adapter = load_adapter(case / info["adapters"][0], ReadOptions(allow_pickle=True))
    for patch in adapter.bind(NameIndex({k: tuple(v.shape) for k, v in base.items()})).patches:
        yield patch, base[patch.key]


def golden_merges(setup: Setup, section: Section) -> None:
    """What every training tool itself computed from its own file, against ours on the device, within the tolerance of the case."""
    golden, passed, total = golden_module(), 0, 0
    for job in golden.jobs():
        if job.mode == "rotation" and job.case == "F13_musubi_dora_oft":
            continue  # that tool's multiplier leaves row factors alone, ours takes them to its power
        info = golden.case_info(job.case)
        base = load_file(job.folder / "base.safetensors")
        got = {k: v.to(setup.device, copy=True) for k, v in base.items()}
        adapter = load_adapter(job.folder / job.adapter, ReadOptions(allow_pickle=True))
        for patch in adapter.bind(NameIndex({k: tuple(v.shape) for k, v in base.items()})).patches:
            norm = None
            if patch.op.needs_base:
                whole = base[patch.key] if patch.rows is None else base[patch.key].narrow(0, *patch.rows)
                norm = row_norms(whole).to(setup.device)
            patch.apply_(got[patch.key], Strength(job.multiplier, job.mode), measured=norm)
        found = golden.faults({k: v.cpu() for k, v in got.items()}, load_file(job.folder / job.expected), base, info["tolerance"])
        total += 1
        passed += not found
        if found:
            section.failed(f"golden {job.name}", "; ".join(found[:3]))
    section.summary["golden merges"] = f"{passed} of {total} as the training tools compute them"


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(side: str, block: int, size: int, std: float = 0.2, seed: int = 0, **more) -> LayerRotation:
    count = -(-size // block)
    stages, stored = more.pop("stages", 1), more.pop("stored", count)
    packed = numbers(stages, stored, block * (block - 1) // 2, seed=seed) * (std * (8 / block) ** 0.5)
    return LayerRotation(side, block, count, generator=packed, size=None if size == count * block else size, **more)


def synthetic(out: int, inn: int) -> dict[str, LayerRotation | Diff]:
    """Every form of a layer that the library knows, for a weight (out, inn)."""

    def factors(n: int, seed: int) -> Tensor:
        return 1 + 0.3 * numbers(n, seed=seed).tanh()

    sizes = {"out": out, "in": inn}
    forms: dict[str, LayerRotation | Diff] = {}
    for side, n in sizes.items():
        plain = rotation(side, 8, n)
        finished = cayley(unpack_skew(plain.generator.double(), 8)).float()
        forms |= {
            f"cayley {side}": plain,
            f"cayley {side} b=32": rotation(side, 32, n),
            f"neumann {side}": rotation(side, 8, n, 0.05, kind="neumann"),
            f"neumann strong {side}": rotation(side, 8, n, 0.18, kind="neumann"),
            f"neumann_old {side}": rotation(side, 8, n, 0.05, kind="neumann_old", terms=6),
            f"expm {side}": rotation(side, 8, n, kind="expm"),
            f"matrix {side}": LayerRotation(side, 8, n // 8, kind="matrix", matrix=finished),
            f"matrix rescaled {side}": LayerRotation(
                side, 8, n // 8, kind="matrix", matrix=finished * factors(n, 3).view(1, n // 8, 8, 1)
            ),
            f"shared {side}": rotation(side, 8, n, stored=1),
            f"cut block {side}": rotation(side, 7, n),
            f"butterfly lycoris {side}": rotation(side, 8, n, 0.1, stages=3, butterfly="lycoris"),
            f"butterfly peft {side}": rotation(side, 8, n, 0.1, stages=3, butterfly="peft"),
            f"rows {side}": replace(plain, row_scale=factors(out, 1), _cache={}),
            f"columns {side}": replace(plain, col_scale=factors(inn, 2), _cache={}),
            f"rows and columns {side}": replace(plain, row_scale=factors(out, 1), col_scale=factors(inn, 2), _cache={}),
            f"butterfly rescaled {side}": rotation(side, 8, n, 0.1, stages=3, butterfly="peft", row_scale=factors(out, 1)),
            f"dora base {side}": replace(plain, row_scale=5 * factors(out, 1), norm_of="base", _cache={}),
            f"dora current {side}": replace(plain, row_scale=5 * factors(out, 1), norm_of="current", _cache={}),
            f"clip {side}": replace(plain, clip=0.3, _cache={}),
            f"constraint {side}": replace(
                plain, constraint=Constraint("whole layer", 2.0, plain.generator.norm() * 2**0.5), _cache={}
            ),
            f"constraint per block {side}": replace(
                plain, constraint=Constraint("per block", 0.5, plain.generator[0].norm(dim=1) * 2**0.5, smooth=True), _cache={}
            ),
            f"added {side}": replace(plain, added=numbers(out, inn, seed=4) * 0.1, row_scale=factors(out, 1), _cache={}),
        }
    return forms | {"difference": Diff(numbers(out, inn, seed=5)), "new value": Diff(numbers(out, inn, seed=6), whole=True)}


def strengths_of(setup: Setup, forms: bool) -> list[Strength]:
    out = [Strength(s, mode) for mode in MODES for s in STRENGTHS]
    if setup.tiny:
        out = [Strength(0.5, mode) for mode in MODES] + [Strength(-1.0, "rotation")]
    if forms:
        out += [Strength(1.0, "rotation", 5.0), Strength(0.5, "rotation", "hold"), Strength(0.5, "geodesic", "hold"), Strength(1.0, "rotation", "off")]
    return out


# ---------------------------------------------------------------- gradients


class Mixed(nn.Module):
    """Linear layers and convolutions, with and without bias, as a training step meets them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.point = nn.Conv2d(32, 32, 1)
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.point(F.silu(self.conv(x)))
        return self.down(F.silu(self.up(y.flatten(2).transpose(1, 2))))


def gradients(config: OFTConfig, device: torch.device, dtype: torch.dtype, autocast: bool = False) -> dict[str, Tensor]:
    """Gradients of one step of a small model, float64 on the CPU; parameters away from zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mixed()
    model.to(device, torch.bfloat16 if autocast else dtype)
    bank = RotationBank({"unet": (model, config.select(model))}, dtype=dtype)
    with torch.no_grad():
        for i, p in enumerate(bank.parameters.values()):
            p.copy_(numbers(*p.shape, seed=i) * 0.3)
    x = numbers(2, 16, 6, 6, seed=9).to(device, torch.bfloat16 if autocast else dtype)
    aim = numbers(2, 36, 32, seed=10).to(device, dtype)
    with bank.installed():
        bank.begin_step(0)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = model(x)
        (y.to(dtype) - aim).square().mean().backward()
        bank.finish_backward()
        return {name: p.grad.cpu().double() for name, p in bank.parameters.items()}


def compare_gradients(setup: Setup, section: Section) -> None:
    for side in ("input", "output"):
        for series in (False, True):
            for share in (False, True):
                config = OFTConfig(
                    oft_block_size=16, side=side, use_cayley_neumann=series, block_share=share, rescale=True, bias="oft_only",
                    target_modules="all-linear", conv_modules="all-conv",
                )
                want = gradients(config, torch.device("cpu"), torch.float64)
                name = f"{side}, {'series' if series else 'exact'}{', shared' if share else ''}"
                for label, dtype, autocast in (("fp32", torch.float32, False), ("bf16 autocast", torch.float32, True)):
                    got = gradients(config, setup.device, dtype, autocast)
                    error = max(float((got[n] - g).norm() / g.norm()) for n, g in want.items())
                    section.rows.append({"what": "gradient", "source": name, "dtype": label, "error": error})
                    # Float32 only: in bfloat16 the model's own roundings are in the gradient, whatever adapts it.
                    if not autocast and not error <= GRADIENT_BOUND:
                        section.failed(f"gradient, {name}, {label}", f"relative error {error:.1e}, bound {GRADIENT_BOUND:g}")


# ---------------------------------------------------------------- section


def tf32_errors(setup: Setup, section: Section) -> None:
    """How far a host that allows TF32 in matrix products moves float32 weights."""
    before = torch.get_float32_matmul_precision()
    weight = numbers(256, 256, seed=9)
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for side in ("out", "in"):
                op = rotation(side, 32, 256)
                want = exact(op, weight.double(), Strength(), op.build(Strength()), None)
                got = weight.to(setup.device, copy=True)
                op.apply_(got, Strength(), rotation=op.build(Strength(), setup.device))
                error = float((got.cpu().double() - want).norm() / (want - weight.double()).norm())
                section.rows.append({"what": f"weight, float32 products '{precision}'", "source": side, "dtype": "fp32", "error": error})
    finally:
        torch.set_float32_matmul_precision(before)


def large_weights(setup: Setup, section: Section, tally: Tally) -> None:
    """Beyond one chunk of the kernels, and with a block size that arithmetic limits."""
    for side, shape in (("out", (12288, 3072)), ("in", (3072, 12288))):
        weight = numbers(*shape, seed=7) * shape[1] ** -0.5
        for block, more in ((32, {}), (128, {}), (32, {"stages": 2, "butterfly": "peft"})):
            if not section.has_time("some large weights"):
                return
            name = f"{shape[0]}x{shape[1]} {side} b={block}{' butterfly' if more else ''}"
            with section.fence(f"large {name}"):
                few = {n: ALL_DTYPES[n] for n in ("fp32", "bf16")}
                patch = Patch(name, "w", rotation(side, block, 12288, **more))
                compare_patch(patch, weight, setup, tally, "large", name, few, [Strength(0.5)], None)


def run(setup: Setup, section: Section) -> None:
    tally = Tally()
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # on by default; convolutions would then differ in their third digit
    try:
        with section.fence("golden merges"):
            golden_merges(setup, section)
        with section.fence("gradients"):
            compare_gradients(setup, section)
        with section.fence("TF32"):
            tf32_errors(setup, section)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32

    few = {n: ALL_DTYPES[n] for n in ("fp32", "bf16", "fp8 e4m3")} if setup.tiny else ALL_DTYPES
    out, inn = (64, 32) if setup.tiny else (320, 192)
    base = numbers(out, inn, seed=9) * inn**-0.5
    x = numbers(60, inn, seed=8)
    for name, op in synthetic(out, inn).items():
        if not section.has_time("some forms"):
            break
        with section.fence(f"form {name}"):
            compare_patch(Patch(name, "w", op), base, setup, tally, "forms", name, few, strengths_of(setup, True), x)

    if not setup.tiny:
        large_weights(setup, section, tally)
    golden = golden_module()
    for case in sorted(p for p in golden.CASES.iterdir() if (p / "case.json").is_file()):
        if not section.has_time("some golden cases"):
            break
        with section.fence(f"golden {case.name}"):
            for patch, weight in golden_patches(case, golden.case_info(case.name)):
                tokens = numbers(30, weight.shape[1], seed=8) if weight.ndim == 2 else None
                compare_patch(
                    patch, weight, setup, tally, "golden", f"{case.name} {patch.key}", few, strengths_of(setup, False), tokens
                )
    report(tally, section)


def report(tally: Tally, section: Section) -> None:
    section.summary["refused"] = f"{tally.refused} combinations of form and strength are not defined"
    lines = []
    for group in tally.groups.values():
        bound = BOUNDS[group.what][group.dtype]
        section.rows.append({**vars(group), "bound": bound})
        if not group.roundings <= bound:
            section.failed(
                f"{group.what}, {group.source}, {group.dtype}",
                f"{group.roundings:.2f} roundings, bound {bound:g}: {group.roundings_at}",
            )
        lines.append(
            [group.what, group.source, group.dtype, str(group.cases), f"{group.error:.1e}", f"{group.roundings:.2f}", f"{bound:g}"]
        )
    head = ["change of", "cases of", "weight", "n", "worst error", "worst in roundings", "bound"]
    section.table += table(head, sorted(lines))
    other = [r for r in section.rows if "roundings" not in r]
    for what in dict.fromkeys(r["what"] for r in other):
        for dtype in dict.fromkeys(r["dtype"] for r in other if r["what"] == what):
            worst = max(r["error"] for r in other if (r["what"], r["dtype"]) == (what, dtype))
            section.table.append(f"{what}, {dtype}: worst error {worst:.1e}")
    section.table += [f"{k}: {v}" for k, v in section.summary.items()]
