"""What a report measures, against plain eigenvalues of every block, and how much work that may take."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oft_core import Constraint, LayerRotation, Strength, describe, measure, read_tensors
from oft_core.profile import profile
from oft_core.rotation import cayley, unpack_skew


def layer(b: int, n: int, size: float, seed: int = 0, kind: str = "cayley", stages: int = 1, **more) -> LayerRotation:
    """Random generators whose blocks differ in size by about a tenth."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(stages, n, b * (b - 1) // 2, generator=g) * size / math.sqrt(b) * torch.empty(stages, n, 1).uniform_(0.9, 1.1, generator=g)
    if more.pop("per_block", False):
        more["constraint"] = Constraint("test", more.pop("limit"), (2 * v.double().square().sum((0, -1))).sqrt().float())
    elif "limit" in more:
        more["constraint"] = Constraint("test", more.pop("limit"), (2 * v.double().square().sum()).sqrt().float(), more.pop("smooth", False))
    return LayerRotation("out", b, n, kind, generator=v, **more)


def planes(r: LayerRotation, strength: Strength) -> np.ndarray:
    """Angles of every plane (blocks, b) from numpy's eigenvalues, the limits by their definition."""
    lam = np.stack([np.abs(np.linalg.eigvals(m)) for m in unpack_skew(r.generator.double(), r.block).flatten(0, 1).numpy()])
    factor = np.ones(len(lam))
    if strength.coft != "off":
        if r.constraint is not None:
            c, norm = r.constraint, r.constraint.norm.double().numpy()
            factor = factor * ((np.minimum(norm, c.limit) + 1e-8) / (norm + 1e-8) if c.smooth else np.minimum(1, c.limit / norm))
        if r.clip is not None:
            factor = factor * np.minimum(1, r.clip / (lam.max(1) * factor))
    lam = lam * factor[:, None]
    angle = lam if r.kind == "expm" else 2 * np.arctan(lam)
    if isinstance(strength.coft, float):
        bound = math.radians(strength.coft) if r.kind == "expm" else math.tan(math.radians(strength.coft) / 2)
        lam = lam * np.minimum(1, bound / np.maximum(lam.max(1), 1e-300))[:, None]
        angle = lam if r.kind == "expm" else 2 * np.arctan(lam)
    return angle


#: Files of several layers: one kind or several, block sizes, limits.
FILES = {
    "alike": [layer(8, 6, 0.2, seed) for seed in range(5)],
    "sizes": [layer(b, 3, 0.3, b) for b in (2, 3, 5, 8, 17, 32, 64)],
    "one large": [layer(8, 6, 0.02, 1), layer(8, 6, 0.7, 2), layer(16, 2, 0.1, 3)],
    "limits": [layer(8, 6, 0.3, 1, limit=0.4), layer(8, 6, 0.3, 2, limit=0.5, smooth=True), layer(8, 6, 0.1, 3)],
    "limits of blocks": [layer(8, 6, 0.3, 1, per_block=True, limit=0.3), layer(8, 4, 0.2, 2, per_block=True, limit=0.9)],
    "clip": [layer(8, 6, 0.5, 1, "neumann", clip=0.2), layer(8, 6, 0.1, 2, "neumann", clip=0.4)],
    "kinds": [layer(8, 6, 0.2, 1, "expm"), layer(8, 6, 0.25, 2, "neumann"), layer(8, 6, 0.2, 3)],
    "butterfly": [layer(8, 6, 0.2, 1, stages=3, butterfly="lycoris")],
    "nothing": [LayerRotation("out", 8, 2, generator=torch.zeros(1, 2, 28))],
    "one plane each": [LayerRotation("in", 8, 40, generator=torch.eye(28)[torch.arange(40) % 28].unsqueeze(0) * 0.3)],
    "blocks of one row": [LayerRotation("out", 1, 24, generator=torch.zeros(1, 24, 0)), layer(8, 2, 0.2, 1)],
    "huge": [layer(8, 3, 1e7, 1), layer(8, 3, 0.1, 2)],
}
STRENGTHS = [Strength(), Strength(1.0, "rotation", "off"), Strength(1.0, "rotation", 15.0), Strength(1.0, "geodesic", "hold")]


@pytest.mark.parametrize("strength", STRENGTHS, ids=lambda s: str(s.coft))
@pytest.mark.parametrize("name", FILES)
def test_angles_are_those_of_every_plane(name: str, strength: Strength) -> None:
    truth = [planes(r, strength).reshape(-1) for r in FILES[name]]
    found = measure.measure(FILES[name], strength)
    assert not found.top_estimated and not found.mean_estimated
    assert found.top == pytest.approx(max(t.max() for t in truth), rel=2e-6, abs=1e-9)
    assert found.mean == pytest.approx(np.concatenate(truth).mean(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_a_sample_gives_the_mean_of_many_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEAN_WORK", 4 * 16**3)
    strength = Strength(1.0, "rotation", 25.0)
    truth = [planes(r, strength).reshape(-1) for r in FILES[name]]
    found = measure.measure(FILES[name], strength)
    assert found.mean_estimated or name == "nothing"
    assert not found.top_estimated and found.top == pytest.approx(max(t.max() for t in truth), rel=2e-6, abs=1e-9)
    assert found.mean == pytest.approx(np.concatenate(truth).mean(), rel=0.15, abs=1e-6)


def test_very_large_blocks_are_estimated_without_decomposing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EXACT_WORK", 10**6)
    monkeypatch.setattr(measure, "_DECOMPOSED", 64)
    file = [layer(600, 1, 0.2, 1), layer(600, 1, 0.15, 2), layer(8, 6, 0.1, 3)]
    truth = np.concatenate([planes(r, Strength()).reshape(-1) for r in file])
    sizes = []
    monkeypatch.setattr(measure, "lambdas", lambda q, run=measure.lambdas: sizes.append(q.shape[-1]) or run(q))
    found = measure.measure(file)
    assert found.top_estimated and found.mean_estimated and set(sizes) == {8}
    assert found.top == pytest.approx(truth.max(), rel=0.05) and found.mean == pytest.approx(truth.mean(), rel=0.05)


@pytest.mark.parametrize("strength", [Strength(s, m, c) for s in (-2.0, 0.5, 3.0) for m in ("rotation", "geodesic") for c in ("file", "off", 40.0)])
def test_reach_is_that_of_the_layer_that_turns_furthest(strength: Strength) -> None:
    for name, file in FILES.items():
        want = max(r.reach(strength) for r in file)
        assert measure.measure(file, strength).reach == pytest.approx(want, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("mode", ["rotation", "geodesic"])
@pytest.mark.parametrize("s", [0.5, 3.0])
def test_reach_where_the_limit_holds(s: float, mode: str) -> None:
    for name, file in FILES.items():
        strength = Strength(s, mode, "hold")
        assert measure.measure(file, strength).reach == pytest.approx(max(r.reach(strength) for r in file), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("terms", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("kind", ["cayley", "expm", "neumann", "neumann_old"])
@pytest.mark.parametrize("size", [0.01, 0.2, 0.5, 40.0])
def test_the_error_is_a_bound_and_not_far_off(kind: str, terms: int, size: float) -> None:
    if size > 1 and kind.startswith("neumann"):
        size = 0.7
    file = [layer(b, 4, size, b, kind, terms=terms) for b in (2, 8, 32)]
    truth = max(r.orthogonality_error() for r in file)
    bound = measure.measure(file).error
    assert truth <= bound <= 20 * truth + 1e-6


def test_a_cut_block_is_no_rotation_and_shows_in_the_error() -> None:
    cut = replace(layer(8, 3, 0.3, 1), size=21)
    weight = torch.eye(21)
    cut.apply_(weight, Strength())
    truth = float((weight.T @ weight - torch.eye(21)).abs().max())
    assert truth > 1e-3 and measure.measure([layer(8, 3, 0.3, 2), cut]).error == pytest.approx(truth, rel=1e-4)


def test_layers_whose_series_diverges() -> None:
    file = [layer(8, 4, size, seed, "neumann") for seed, size in enumerate((0.1, 0.5, 0.55, 0.9, 2.0, 0.01, 0.6))]
    file += [layer(32, 2, 0.45, 9, "neumann"), layer(8, 4, 2.0, 1, "neumann", clip=0.9), layer(8, 4, 2.0, 1)]
    want = tuple(i for i, r in enumerate(file) if r.kind == "neumann" and planes(r, Strength()).max() >= math.pi / 2)
    assert 0 < len(want) < 9 and measure.measure(file).diverging == want
    assert 8 in measure.measure(file, Strength(1.0, "rotation", "off")).diverging
    assert measure.measure(file, Strength(1.0, "rotation", 30.0)).diverging == ()


def finished(b: int, n: int, size: float, seed: int) -> LayerRotation:
    m = cayley(unpack_skew(layer(b, n, size, seed).generator.double(), b)).float()
    return LayerRotation("out", b, n, kind="matrix", matrix=m)


def test_finished_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    file = [finished(8, 6, 0.2, 1), finished(8, 30, 0.3, 2), finished(4, 3, 0.1, 3)]
    truth = [r.angles() for r in file]
    top, mean = max(float(t.max()) for t in truth), float(torch.cat([t.flatten() for t in truth]).mean())
    found = measure.measure(file)
    assert (found.top, found.mean) == pytest.approx((top, mean)) and not found.top_estimated and found.error < 1e-6
    monkeypatch.setattr(measure, "MEAN_WORK", 10 * 16**3)
    rough = measure.measure(file)
    assert rough.top_estimated and (rough.top, rough.mean) == pytest.approx((top, mean), rel=0.1)
    stretched = replace(file[0], matrix=file[0].matrix * 1.01, _cache={})
    assert measure.measure([file[1], stretched]).error == pytest.approx(1.01**2 - 1, rel=1e-3)


# ------------------------------------------------------------------ work


class Calls(TorchDispatchMode):
    """Counts the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def tiny(layers: int, suffix: str) -> dict[str, torch.Tensor]:
    """Layers of one block of 4, of different sizes."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(layers):
        shape = (1, 6) if suffix == "oft_R.weight" else (1, 4, 4)
        value = torch.randn(shape, generator=g) * 0.1
        tensors[f"lora_unet_layer_{i}.{suffix}"] = torch.eye(4)[None] + value if suffix == "oft_diag" else value
        if suffix == "oft_blocks":
            tensors[f"lora_unet_layer_{i}.alpha"] = torch.tensor(0.05)
    return tensors


@pytest.mark.parametrize("suffix", ["oft_blocks", "oft_R.weight", "oft_diag"])
def test_many_tiny_layers_take_a_few_operations_each(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 100,000 layers has to stay a matter of seconds: linear in the layers, and next to no decompositions."""
    decomposed = []
    monkeypatch.setattr(measure, "lambdas", lambda q, run=measure.lambdas: decomposed.append(len(q)) or run(q))
    monkeypatch.setattr(measure, "MEAN_WORK", 100 * 16**3)
    counts = []
    for layers in (500, 1000):
        adapter = read_tensors(tiny(layers, suffix))
        adapter.operations()
        with Calls() as calls:
            describe(adapter, None, Strength(1.5))
        counts.append(calls.count)
    a_layer = (counts[1] - counts[0]) / 500
    assert a_layer <= 5, f"{a_layer} operations a layer"
    assert counts[0] - 500 * a_layer < 2500, "operations whatever the number of layers"
    assert sum(decomposed) <= 2 * 250


def test_few_blocks_of_a_full_size_file_are_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are alike are the hardest case: no norm tells them apart."""
    r = random.Random(0)
    file = [layer(32, 100, 0.1, r.randrange(10**6)) for _ in range(20)]
    decomposed = []
    monkeypatch.setattr(measure, "lambdas", lambda q, run=measure.lambdas: decomposed.append(len(q)) or run(q))
    monkeypatch.setattr(measure, "MEAN_WORK", 100 * 32**3)
    found = measure.measure(file)
    assert not found.top_estimated and sum(decomposed) <= 100 + 100, "the sample of the mean, and a twentieth of all for the largest"
    assert found.top == pytest.approx(max(float(r.angles().max()) for r in file), rel=2e-6)


def test_text_says_what_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = read_tensors(tiny(20, "oft_blocks"))
    text = describe(adapter).to_text()
    assert "about" not in text and "Orthogonality error at most" in text
    monkeypatch.setattr(measure, "MEAN_WORK", 4 * 16**3)
    report = describe(adapter)
    assert report.mean_estimated and not report.angles_estimated
    assert "mean about" in report.to_text() and "Largest angle about" not in report.to_text()


def test_nothing_follows_a_hosts_autocast() -> None:
    """Web UIs work under autocast: reports, rotations, weights and directions are the same numbers under it."""
    g = torch.Generator().manual_seed(0)
    tensors = {f"lora_unet_x{i}.oft_R.weight": 0.3 * torch.randn(40, 28, generator=g) for i in range(3)}
    tensors["lora_unet_y.hra_u"] = torch.randn(64, 2, generator=g).repeat_interleave(2, 1) + 0.2 * torch.randn(64, 4, generator=g)
    tensors["lora_unet_z.psoft_R.weight"] = 0.3 * torch.randn(28, generator=g)
    weight = torch.randn(24, 64, generator=g)

    def all_of_it() -> tuple:
        adapter = read_tensors(tensors)
        found = []
        for op in (pieces[0].op for pieces in adapter.operations().values()):
            w = weight.repeat(1, 5) if op.axis == 320 else weight.clone()
            op.apply_(w, Strength(0.7), measured=op.measure(w) if op.needs_base else None)
            found.append(w)
        return describe(adapter).to_text(), [p.to_dict() for p in profile(adapter)], found

    plain = all_of_it()
    with torch.autocast("cpu", torch.bfloat16):
        under = all_of_it()
    assert under[:2] == plain[:2]
    assert all(torch.equal(a, b) for a, b in zip(under[2], plain[2], strict=True))
