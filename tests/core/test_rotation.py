"""The pure functions against float64 definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from oft_core import rotation as rot

BLOCKS = (2, 3, 8, 33, 64)


def skew(n: int, b: int, size: float, seed: int = 0) -> torch.Tensor:
    """Random skew blocks (n, b, b) whose largest lam is ``size``, float64."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, b, b, generator=g, dtype=torch.float64)
    q = a - a.transpose(-1, -2)
    return q * (size / torch.linalg.matrix_norm(q, 2).amax())


@pytest.mark.parametrize("b", BLOCKS)
def test_pack_and_unpack(b: int) -> None:
    q = skew(5, b, 1.0)
    v = rot.pack_skew(q)
    assert v.shape == (5, b * (b - 1) // 2)
    assert torch.equal(rot.unpack_skew(v, b), q)
    assert v[0, 0] == q[0, 0, 1]  # the upper triangle is positive, row by row
    assert rot.block_size_of(v.shape[-1]) == b


@pytest.mark.parametrize("shape", [(1, 3), (5,), (2, 0), ()])
def test_blocks_of_one_row_and_no_blocks(shape: tuple[int, ...]) -> None:
    for b, dtype in ((1, torch.float32), (1, torch.float64), (4, torch.float32)):
        v = torch.ones(*shape, b * (b - 1) // 2, dtype=dtype)
        q = rot.unpack_skew(v, b)
        assert q.shape == (*shape, b, b) and torch.equal(rot.pack_skew(q), v)
        assert torch.equal(q, rot.unpack_skew(v.double(), b).to(dtype))


@pytest.mark.parametrize("length", [0, 2, 4, 5, 7, 11])
def test_impossible_vector_lengths(length: int) -> None:
    assert rot.block_size_of(length) is None


@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_cayley_is_the_definition(b: int, size: float) -> None:
    q = skew(4, b, size)
    eye = torch.eye(b, dtype=q.dtype)
    want = torch.stack([(eye + m) @ torch.linalg.inv(eye - m) for m in q])
    got = rot.cayley(q)
    assert (got - want).abs().max() < 1e-11
    assert rot.orthogonality_error(got).max() < 1e-11
    assert (rot.cayley(-q) - got.transpose(-1, -2)).abs().max() < 1e-11


def test_cayley_gradient() -> None:
    q = skew(2, 5, 0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rot.cayley(x - x.transpose(-1, -2)), (q,))


@pytest.mark.parametrize(
    ("terms", "old", "want"),
    [
        (1, False, [1]), (2, False, [1, 2]), (3, False, [1, 2, 2, 1]), (4, False, [1, 2, 2, 1]), (5, False, [1, 2, 2, 2, 1]),
        (7, False, [1, 2, 2, 2, 2, 2, 1]), (3, True, [1, 2, 2]), (5, True, [1, 2, 2, 2, 2]),
    ],
)
def test_series_coefficients(terms: int, old: bool, want: list[int]) -> None:
    assert rot.neumann_coefficients(terms, old) == want
    q = skew(3, 6, 0.3)
    powers = sum(c * torch.linalg.matrix_power(q, k) for k, c in enumerate(want))
    assert (rot.polynomial(q, rot.neumann_coefficients(terms, old)) - powers).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["cayley", "expm", "neumann", "neumann_old"])
def test_plane_values_are_those_of_the_matrix(name: str) -> None:
    kind = rot.transform(name)
    lam = torch.tensor([[0.05, 0.3, 0.8]], dtype=torch.float64)
    gain, angle = kind.plane(lam)
    for i, value in enumerate(lam[0]):
        q = torch.tensor([[0.0, -float(value)], [float(value), 0.0]], dtype=torch.float64).unsqueeze(0)
        m = kind.matrix(q)[0]
        assert m[0, 0] == pytest.approx(float(gain[0, i] * torch.cos(angle[0, i])), abs=1e-12)
        assert m[1, 0] == pytest.approx(float(gain[0, i] * torch.sin(angle[0, i])), abs=1e-12)


@pytest.mark.parametrize("b", BLOCKS)
def test_spectrum_rebuilds_the_rotation(b: int) -> None:
    q = skew(4, b, 1.5)
    sp = rot.generator_spectrum(q)
    angle = 2 * torch.atan(sp.planes)
    assert (sp.apply(torch.cos(angle), torch.sin(angle)) - rot.cayley(q)).abs().max() < 1e-7
    r = rot.cayley(q)
    back = rot.rotation_spectrum(r)
    assert (back.apply(torch.cos(back.planes), torch.sin(back.planes)) - r).abs().max() < 1e-7
    half = back.apply(torch.cos(back.planes / 2), torch.sin(back.planes / 2))
    assert (half @ half - r).abs().max() < 1e-7


@pytest.mark.parametrize("lam", [0.2, 0.45, 0.6, 0.95])
def test_series_strength_is_exact_at_the_ends_and_continuous(lam: float) -> None:
    kind = rot.transform("neumann")
    planes = torch.tensor([lam], dtype=torch.float64)
    at_one = rot.scaled_planes(kind, planes, 1.0)
    assert [float(v) for v in at_one] == pytest.approx([float(v) for v in kind.plane(planes)], abs=1e-12)
    near_zero = rot.scaled_planes(kind, planes, 1e-9)
    assert float(near_zero[0]) == pytest.approx(1) and float(near_zero[1]) == pytest.approx(0, abs=1e-8)
    previous = None
    for i in range(1, 3001):
        gain, angle = (float(v) for v in rot.scaled_planes(kind, planes, i / 1000))
        assert 0 < gain <= 1
        if previous is not None:
            assert abs(gain - previous[0]) < 8e-3 and abs(angle - previous[1]) < 8e-3
        previous = gain, angle


def test_series_strength_follows_the_scaled_generator_while_safe() -> None:
    kind = rot.transform("neumann")
    planes = torch.tensor([0.8], dtype=torch.float64)
    gain, angle = rot.scaled_planes(kind, planes, 0.5)
    want_gain, want_angle = kind.plane(planes * 0.5)
    assert float(gain) == pytest.approx(float(want_gain)) and float(angle) == pytest.approx(float(want_angle))


def test_the_last_lambda_is_the_spectral_norm() -> None:
    q = skew(6, 17, 2.0, seed=3)
    assert (rot.lambdas(q)[:, -1] - torch.linalg.matrix_norm(q, 2)).abs().max() < 1e-12


def test_angle_of_lam_and_back() -> None:
    for name in ("cayley", "expm", "neumann"):
        kind = rot.transform(name)
        for degrees in (5.0, 60.0, 120.0):
            lam = kind.lam_of_angle(math.radians(degrees))
            assert math.degrees(float(kind.angle(torch.tensor(lam, dtype=torch.float64)))) == pytest.approx(degrees)


@pytest.mark.parametrize("b", [2, 16, 32, 65, 256, 257])
@pytest.mark.parametrize("size", [1e-6, 0.3, 0.377, 0.379, 0.95, 1.0, 30.0])
def test_cayley_in_float32_is_the_rounded_one(b: int, size: float) -> None:
    """A few blocks far out among near ones: each goes its own way."""
    q = skew(3, b, size) * torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64).view(3, 1, 1)
    want = np.stack([(np.eye(b) + m) @ np.linalg.inv(np.eye(b) - m) for m in q.numpy()])
    got = rot.cayley_float(q)
    assert got.dtype == torch.float32
    assert np.abs(got.double().numpy() - want).max() < 2.0**-25 + 2e-8  # half a unit of the last place, and the series' own error
    assert rot.orthogonality_error(got.double()).max() < 1.3e-7
    assert torch.equal(rot.cayley_float(q[1:2]), got[1:2])


@pytest.mark.parametrize("name", ["cayley", "expm"])
def test_large_generators_have_the_planes_of_their_definition(name: str) -> None:
    """Planes of 1e8 and of 0.5 in one block, in a basis of no symmetry: the small ones are not lost in the large ones."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    lam = np.array([0.5, 2.0, 1e8])
    planes = np.zeros((6, 6))
    planes[[0, 2, 4], [1, 3, 5]], planes[[1, 3, 5], [0, 2, 4]] = -lam, lam
    angle = 2 * np.arctan(lam) if name == "cayley" else lam
    turned = np.zeros((6, 6))
    turned[range(6), range(6)] = np.repeat(np.cos(angle), 2)
    turned[[0, 2, 4], [1, 3, 5]], turned[[1, 3, 5], [0, 2, 4]] = -np.sin(angle), np.sin(angle)
    q = torch.from_numpy(basis @ planes @ basis.T).unsqueeze(0)
    q = (q - q.transpose(1, 2)) / 2
    m = rot.matrices(name, 5, q, large=True)
    assert rot.orthogonality_error(m) < 1e-12
    if name == "cayley":  # an angle of 1e8 radians is not known to better than its own last place
        assert np.abs(m[0].numpy() - basis @ turned @ basis.T).max() < 1e-6


@pytest.mark.parametrize("b", [2, 3, 8, 33, 64])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e8])
def test_lambda_bounds_hold(b: int, size: float) -> None:
    dense = skew(20, b, size)
    one_plane = torch.zeros_like(dense)
    one_plane[:, 0, 1], one_plane[:, 1, 0] = size, -size
    for q in (dense, one_plane, torch.zeros_like(dense)):
        v = rot.pack_skew(q).float()
        truth = np.array([np.abs(np.linalg.eigvals(m)).max() for m in rot.unpack_skew(v.double(), b).numpy()])
        low, high = (t.numpy() for t in rot.lambda_bounds(v, b))
        assert (low <= truth * (1 + 1e-12)).all() and (truth <= high).all()
        assert (high <= 1.25 * truth).all() and (low >= 0.7 * truth).all()
