"""Turned activations against turned weights: every form of a layer, alone and together."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from oft_core import Diff, LayerRotation, ShapeError, Strength
from oft_core.activations import Change, Pipeline, arriving_delta, map_vectors, terms_of
from oft_core.adapter import apply_swapped_
from oft_core.subspace import Principal

OUT, IN = 48, 32


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(side: str = "out", block: int = 8, size: int | None = None, seed: int = 0, std: float = 0.2, **more) -> LayerRotation:
    size = size or (OUT if side == "out" else IN)
    count = -(-size // block)
    stages = more.pop("stages", 1)
    stored = more.pop("stored", count)
    packed = numbers(stages, stored, block * (block - 1) // 2, seed=seed) * std
    return LayerRotation(side, block, count, generator=packed, size=None if size == count * block else size, **more)


def factors(n: int, seed: int) -> torch.Tensor:
    return 1 + 0.3 * numbers(n, seed=seed).tanh()


ORTHOGONAL = torch.linalg.qr(numbers(6, 8, 8, seed=3).double())[0].float()
ORTHOGONAL[torch.linalg.det(ORTHOGONAL.double()) < 0, 0] *= -1
FORMS = {
    "out": rotation("out"),
    "in": rotation("in"),
    "out, rows": rotation("out", row_scale=factors(OUT, 1)),
    "in, rows": rotation("in", row_scale=factors(OUT, 1)),
    "out, columns": rotation("out", col_scale=factors(IN, 2)),
    "in, columns": rotation("in", col_scale=factors(IN, 2)),
    "out, both": rotation("out", row_scale=factors(OUT, 1), col_scale=factors(IN, 2)),
    "in, both": rotation("in", row_scale=factors(OUT, 1), col_scale=factors(IN, 2)),
    "shared block": rotation("out", stored=1),
    "cut block": rotation("in", block=5),
    "cut block, shared": rotation("in", block=5, stored=1),
    "neumann": rotation("in", kind="neumann", std=0.03),
    "matrix": LayerRotation("out", 8, 6, kind="matrix", matrix=ORTHOGONAL.unsqueeze(0)),
    "butterfly": rotation("out", block=4, stages=3, butterfly="lycoris", row_scale=factors(OUT, 1)),
    "butterfly in": rotation("in", block=4, stages=4, butterfly="peft", col_scale=factors(IN, 1)),
    "butterfly, columns": rotation("out", block=4, stages=3, butterfly="peft", col_scale=factors(IN, 1)),
    "dora": rotation("in", row_scale=5 * factors(OUT, 1), norm_of="base"),
    "dora out": rotation("out", row_scale=5 * factors(OUT, 1), norm_of="base"),
    "dora, current": rotation("in", row_scale=5 * factors(OUT, 1), norm_of="current"),
    "subspace": LayerRotation("in", 5, 1, generator=numbers(1, 1, 10, seed=6) * 0.3, basis=torch.linalg.qr(numbers(IN, 5, seed=7))[0]),
    "principal": LayerRotation("in", 6, 1, generator=numbers(1, 1, 15, seed=6) * 0.3, basis_of=Principal()),
    "added": rotation("in", added=numbers(OUT, IN, seed=4)),
    "added out, rows": rotation("out", added=numbers(OUT, IN, seed=4), row_scale=factors(OUT, 1)),
    "core": rotation("out", core_alpha=0.0),
    "core, limited": rotation("out", core_alpha=0.5, row_scale=factors(OUT, 1)),
    "core, butterfly": rotation("out", block=4, stages=3, butterfly="lycoris", core_alpha=0.0, row_scale=factors(OUT, 1)),
    "difference": Diff(numbers(OUT, IN, seed=5)),
    "new value": Diff(numbers(OUT, IN, seed=5), whole=True),
}
CASES = [
    (name, mode, s)
    for name, mode, s in itertools.product(FORMS, ("rotation", "geodesic", "linear", "core"), (1.0, 0.4, -1.6))
    if (mode == "core") == name.startswith("core")
]


def norms_for(op, strength: Strength, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor | None:
    """What a host looks up: norms of the unpatched rows, or of those that arrive."""
    if isinstance(op, LayerRotation) and op.basis_of is not None:
        return op.measure(base)
    if isinstance(op, Diff) or not op.norm_of:
        return None
    if op.norm_of == "base":
        return base.norm(dim=1)
    delta, gain = arriving_delta(op, strength)
    return (weight if delta is None else weight + gain * delta).norm(dim=1)


def check(ops, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None, limit: float = 2e-6) -> Pipeline:
    """ops: (op, strength, start, stop, swap), applied one after the other both ways."""
    changes, turned, base = [], weight.clone(), weight
    for op, at, start, stop, swap in ops:
        rows, part = slice(start, stop), base[start:stop]
        norm = norms_for(op, at, turned[rows], part)
        half = (stop - start) // 2
        order = torch.cat([torch.arange(half, stop - start), torch.arange(half)]) if swap else torch.arange(stop - start)
        terms = terms_of(op, at, op.build(at), norm if norm is None or norm.ndim > 1 else norm[order], "cpu")
        changes.append(Change(start, stop, terms, swap))
        apply_swapped_(op, turned[rows], at, swap, measured=norm)
    pipeline = Pipeline(changes, len(weight))
    got = pipeline(x, lambda v: F.linear(v, weight, bias), lambda _: bias, -1)
    expected = F.linear(x.double(), turned.double(), None if bias is None else bias.double())
    assert got.shape == expected.shape
    error = (got - expected).norm() / expected.norm()
    assert error < limit, float(error)
    assert (got - F.linear(x, weight, bias)).norm() > 0.01 * got.norm(), "nothing was turned"
    return pipeline


@pytest.mark.parametrize(("name", "mode", "s"), CASES)
def test_one_change(name: str, mode: str, s: float) -> None:
    op, at = FORMS[name], Strength(s, mode)
    check([(op, at, 0, OUT, False)], numbers(OUT, IN, seed=9), numbers(2, 7, IN, seed=8), numbers(OUT, seed=7))


@pytest.mark.parametrize("coft", ["hold", "off", 5.0])
def test_limits(coft: str | float) -> None:
    check([(rotation("out"), Strength(1.5, "rotation", coft), 0, OUT, False)], numbers(OUT, IN, seed=9), numbers(5, IN, seed=8))


def test_any_order_of_changes() -> None:
    """Rotations of either side, differences and factors after one another; no two of them commute."""
    names = ["out", "in, both", "added out, rows", "butterfly in", "dora, current"]
    for order in itertools.permutations(names, 2):
        ops = [(FORMS[n], Strength(0.6, "linear" if i == 1 else "rotation"), 0, OUT, False) for i, n in enumerate(order)]
        check(ops, numbers(OUT, IN, seed=9), numbers(4, IN, seed=8), numbers(OUT, seed=7))


def test_rows_of_a_fused_layer() -> None:
    """Three input sides cost three inputs of the layer, not two to the third; rotations across the cuts before and after them."""
    third = OUT // 3
    parts = [(rotation("in", seed=i), Strength(0.8), i * third, (i + 1) * third, False) for i in range(3)]
    across = (rotation("out", block=16, seed=7), Strength(1.1), 0, OUT, False)
    halves = (rotation("out", size=32, seed=5, row_scale=factors(32, 3)), Strength(-0.5), 8, 40, True)
    mixed = (rotation("in", seed=6, row_scale=factors(20, 3)), Strength(0.5, "linear"), 10, 30, False)
    weight, x, bias = numbers(OUT, IN, seed=9), numbers(4, IN, seed=8), numbers(OUT, seed=7)
    assert len(check(parts, weight, x, bias)._chains) == 3
    for ops in itertools.permutations([parts[0], across, halves, mixed]):
        check(list(ops), weight, x, bias)
    check([parts[0], parts[2]], weight, x, bias)
    check([halves], weight, x)


def test_images() -> None:
    """Channels of convolutions, as the host's layers have them."""
    kernel, x, bias = numbers(OUT, 6, 3, 3, seed=1), numbers(2, 6, 5, 4, seed=2), numbers(OUT, seed=3)
    op, at = rotation("out", row_scale=factors(OUT, 1)), Strength(0.7)
    turned = kernel.clone()
    op.apply_(turned, at)
    pipeline = Pipeline([Change(0, OUT, terms_of(op, at, op.build(at), None, "cpu"))], OUT)
    got = pipeline(x, lambda v: F.conv2d(v, kernel, bias, padding=1), lambda _: bias, 1)
    torch.testing.assert_close(got, F.conv2d(x, turned, bias, padding=1), rtol=1e-5, atol=1e-5)


def test_gradients_pass_through() -> None:
    weight, bias = numbers(OUT, IN, seed=9).requires_grad_(), numbers(OUT, seed=7)
    ops = [(FORMS["in, rows"], Strength(0.5, "linear")), (FORMS["out"], Strength(0.8))]
    x, again = numbers(2, 3, IN, seed=8).requires_grad_(), numbers(2, 3, IN, seed=8).requires_grad_()
    changes = [Change(0, OUT, terms_of(op, at, op.build(at), None, "cpu")) for op, at in ops]
    got = Pipeline(changes, OUT)(x, lambda v: F.linear(v, weight, bias), lambda _: bias, -1)
    turned = weight.detach().clone()
    for op, at in ops:
        op.apply_(turned, at)
    expected = F.linear(again, turned, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    (got * numbers(*got.shape)).sum().backward()
    (expected * numbers(*got.shape)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-5, atol=1e-5)


def test_many_tokens_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oft_core.blocks.chunk_size", lambda _: 40 * OUT)
    ops = [(FORMS["in, both"], Strength(0.5, "linear"), 0, OUT, False), (FORMS["out"], Strength(2.0), 0, OUT, False)]
    check(ops, numbers(OUT, IN, seed=9), numbers(3, 111, IN, seed=8), numbers(OUT, seed=7))


def test_vectors_of_a_table() -> None:
    table, op, at = numbers(20, IN, seed=1), FORMS["in, columns"], Strength(0.6, "linear")
    turned, ids = table.clone(), torch.tensor([[3, 5, 3], [0, 19, 1]])
    op.apply_(turned, at)
    got = map_vectors(F.embedding(ids, table), terms_of(op, at, op.build(at), None, "cpu"))
    torch.testing.assert_close(got, F.embedding(ids, turned), rtol=1e-5, atol=1e-6)
    rows = rotation("in", row_scale=factors(20, 1))
    with pytest.raises(ShapeError):
        map_vectors(table[ids], terms_of(rows, at, rows.build(at), None, "cpu"))


def test_one_rounding_in_half_precision() -> None:
    """bfloat16 activations: the error beside exact arithmetic is that of the layer and at most two roundings more."""
    weight, x = numbers(OUT, IN, seed=9).bfloat16(), numbers(500, IN, seed=8).bfloat16()
    for name in ("in", "out", "butterfly"):
        op, at, turned = FORMS[name], Strength(), weight.double()
        op.apply_(turned, at)
        changes = [Change(0, OUT, terms_of(op, at, op.build(at), None, "cpu"))]
        got = Pipeline(changes, OUT)(x, lambda v: F.linear(v, weight), lambda _: None, -1)
        exact = x.double() @ turned.t()
        own = (F.linear(x, weight).double() - x.double() @ weight.double().t()).norm()
        assert got.dtype == torch.bfloat16
        assert (got.double() - exact).norm() < 1.5 * own, name
