"""Strength modes and COFT on canonical layers, measured on the dense matrix that a layer amounts to."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from oft_core import Constraint, LayerRotation, Strength, StrengthError, ValueFault, build_all
from oft_core.layer import Diff
from oft_core.rotation import cayley, unpack_skew

N = 48
STRENGTHS = (0.37, 3.0, -2.0, -0.5)


def packed(stages: int, n: int, b: int, lam: float, seed: int = 1) -> torch.Tensor:
    """Random packed generators whose largest lam is ``lam``."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(stages, n, b * (b - 1) // 2, generator=g)
    top = torch.linalg.matrix_norm(unpack_skew(v.double(), b), 2).amax()
    return (v * (lam / top)).float()


def factors(count: int, seed: int = 5) -> torch.Tensor:
    return torch.exp(0.3 * torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def finished(n: int, b: int, scaled: bool) -> torch.Tensor:
    m = cayley(unpack_skew(packed(1, n, b, 0.8).double(), b)).float()
    return m * factors(n * b).view(1, n, b, 1) if scaled else m


EXACT = {
    "out": LayerRotation("out", 8, 6, generator=packed(1, 6, 8, 0.9)),
    "in": LayerRotation("in", 8, 6, generator=packed(1, 6, 8, 0.9)),
    "shared": LayerRotation("in", 8, 6, generator=packed(1, 1, 8, 0.9)),
    "one big block": LayerRotation("out", 48, 1, generator=packed(1, 1, 48, 1.4)),
    "expm": LayerRotation("in", 6, 8, kind="expm", generator=packed(1, 8, 6, 1.2)),
    "lycoris butterfly": LayerRotation("out", 6, 8, generator=packed(4, 8, 6, 0.5), butterfly="lycoris"),
    "peft butterfly": LayerRotation("in", 6, 8, generator=packed(3, 8, 6, 0.5), butterfly="peft"),
    "finished": LayerRotation("out", 8, 6, kind="matrix", matrix=finished(6, 8, False)),
}
SCALED = {
    "out rescaled": replace(EXACT["out"], row_scale=factors(N), _cache={}),
    "in rescaled": replace(EXACT["in"], row_scale=factors(N), _cache={}),
    "butterfly rescaled": replace(EXACT["lycoris butterfly"], row_scale=factors(N), _cache={}),
    "finished rescaled": LayerRotation("out", 8, 6, kind="matrix", matrix=finished(6, 8, True)),
    "columns": replace(EXACT["in"], col_scale=factors(N), _cache={}),
}
SERIES = {
    "weak": LayerRotation("in", 8, 6, kind="neumann", generator=packed(1, 6, 8, 0.15)),
    "strong": LayerRotation("in", 8, 6, kind="neumann", generator=packed(1, 6, 8, 0.9)),
}
ALL = {**EXACT, **SCALED, **SERIES}


def dense(layer: LayerRotation, strength: Strength) -> torch.Tensor:
    """The N x N matrix that multiplies column vectors (out) or, transposed, row vectors (in); float64."""
    w = torch.eye(N)
    layer.apply_(w, strength)
    return (w if layer.side == "out" else w.T).double()


def weight(dtype: torch.dtype = torch.float32, cols: int = N) -> torch.Tensor:
    return torch.randn(N, cols, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", ["rotation", "geodesic", "linear"])
def test_zero_is_the_base_bit_for_bit(name: str, mode: str) -> None:
    w = weight()
    ALL[name].apply_(w, Strength(0.0, mode))
    assert torch.equal(w, weight())


@pytest.mark.parametrize("name", ALL)
def test_one_is_the_file_in_every_mode(name: str) -> None:
    want = dense(ALL[name], Strength(1.0, "linear"))
    for mode in ("rotation", "geodesic"):
        assert (dense(ALL[name], Strength(1.0, mode)) - want).abs().max() < 2e-6


@pytest.mark.parametrize("name", [*EXACT, *SCALED])
@pytest.mark.parametrize("mode", ["rotation", "geodesic"])
@pytest.mark.parametrize("s", [1.0, 0.4, 2.5])
def test_minus_undoes_plus(name: str, mode: str, s: float) -> None:
    w = weight()
    ALL[name].apply_(w, Strength(s, mode))
    assert (w - weight()).norm() / weight().norm() > 0.05
    ALL[name].apply_(w, Strength(-s, mode))
    assert (w - weight()).norm() / weight().norm() < 1e-6


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("mode", ["rotation", "geodesic"])
@pytest.mark.parametrize("s", STRENGTHS)
def test_orthogonal_at_every_strength(name: str, mode: str, s: float) -> None:
    m = dense(EXACT[name], Strength(s, mode))
    assert (m.T @ m - torch.eye(N, dtype=m.dtype)).abs().max() <= 3e-6


@pytest.mark.parametrize("name", ["in", "shared", "expm", "peft butterfly"])
@pytest.mark.parametrize("s", STRENGTHS)
def test_input_side_keeps_neuron_norms(name: str, s: float) -> None:
    w = weight()
    EXACT[name].apply_(w, Strength(s))
    assert (w.norm(dim=1) / weight().norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    "name",
    ["out", "in", "shared", "one big block", "expm", "finished", "in rescaled", "weak", "strong", "lycoris butterfly", "peft butterfly"],
)
def test_geodesic_strengths_add(name: str) -> None:
    # Not for row scales on the rotated side: they do not commute with the rotation.
    twice, once = weight(), weight()
    ALL[name].apply_(twice, Strength(0.3, "geodesic"))
    ALL[name].apply_(twice, Strength(0.5, "geodesic"))
    ALL[name].apply_(once, Strength(0.8, "geodesic"))
    assert (twice - once).norm() / once.norm() < 1e-6


def test_geodesic_steps_are_equal_angles() -> None:
    layer = LayerRotation("in", 2, 24, generator=packed(1, 24, 2, 1.0))
    full = math.atan2(*dense(layer, Strength(1, "geodesic"))[[1, 0], [0, 0]].tolist())
    for s in (0.25, 0.5, 1.5, -1):
        m = dense(layer, Strength(s, "geodesic"))
        assert math.atan2(float(m[1, 0]), float(m[0, 0])) == pytest.approx(s * full, abs=1e-6)


def test_geodesic_power_of_a_butterfly_is_that_of_its_product() -> None:
    layer = EXACT["lycoris butterfly"]
    half = dense(layer, Strength(0.5, "geodesic"))
    assert (half @ half - dense(layer, Strength(1.0))).abs().max() < 3e-6
    by_factor = dense(layer, Strength(0.5))
    assert (by_factor @ by_factor - dense(layer, Strength(1.0))).abs().max() > 1e-2  # the generators' rule is another one
    capped = dense(layer, Strength(1.5, "geodesic", 12.0))
    assert math.degrees(math.acos(float(torch.linalg.eigvals(capped).real.min()))) == pytest.approx(12.0, abs=0.05)


@pytest.mark.parametrize("s", [0.99, 1.0, -1.0, 2.0])
def test_a_limit_in_degrees_is_the_products_at_every_geodesic_strength(s: float) -> None:
    layer = EXACT["lycoris butterfly"]
    m, eye = dense(layer, Strength(s, "geodesic", 12.0)), torch.eye(N, dtype=torch.float64)
    assert math.degrees(math.acos(float(torch.linalg.eigvals(m).real.min()))) == pytest.approx(12.0, abs=0.05)
    assert (m @ dense(layer, Strength(-s, "geodesic", 12.0)) - eye).abs().max() < 2e-6


def test_geodesic_power_of_a_long_butterfly_is_refused() -> None:
    layer = LayerRotation("out", 4, 1024, generator=packed(2, 1024, 4, 0.3), butterfly="lycoris")
    for allowed in (Strength(1.0, "geodesic"), Strength(0.5), Strength(0.5, "linear")):
        layer.check_strength(allowed)
    for refused in (Strength(0.5, "geodesic"), Strength(1.0, "geodesic", 12.0)):
        with pytest.raises(StrengthError, match="not computed"):
            layer.check_strength(refused, module="m")


def test_rotation_scales_the_generator() -> None:
    layer = EXACT["out"]
    for s in (0.5, -1.5):
        want = torch.block_diag(*cayley(s * unpack_skew(layer.generator[0].double(), 8)))
        assert (dense(layer, Strength(s)) - want).abs().max() < 1e-6


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("s", [0.5, -1.0, 2.0])
def test_linear_is_linear(name: str, s: float) -> None:
    base, full = weight().double(), weight()
    ALL[name].apply_(full, Strength(1.0, "linear"))
    got = weight()
    ALL[name].apply_(got, Strength(s, "linear"))
    want = base + s * (full.double() - base)
    assert (got - want).abs().max() < 5e-6


def test_core_is_strength_squared_with_raw_alpha_and_no_rescale() -> None:
    layer = replace(SCALED["out rescaled"], core_alpha=0.5, _cache={})
    q = unpack_skew(layer.generator[0].double(), 8)
    q = q * min(1, 0.5 / float(q.norm()))
    full = torch.block_diag(*cayley(q))
    for s in (0.5, -1.0, 2.0):
        want = torch.eye(N, dtype=torch.float64) + s * s * (full - torch.eye(N, dtype=torch.float64))
        assert (dense(layer, Strength(s, "core")) - want).abs().max() < 1e-5
    with pytest.raises(StrengthError, match="does not read this dialect"):
        EXACT["in"].check_strength(Strength(0.5, "core"))


# ------------------------------------------------------------------ series and finished matrices


def test_series_is_reproduced_not_improved() -> None:
    layer = SERIES["strong"]
    q = unpack_skew(layer.generator[0].double(), 8)
    eye = torch.eye(8, dtype=q.dtype)
    want = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    assert (dense(layer, Strength(1.0)) - torch.block_diag(*want)).abs().max() < 1e-6
    assert (torch.block_diag(*want) - torch.block_diag(*cayley(q))).abs().max() > 0.1


def test_series_that_diverges_allows_only_its_own_strength() -> None:
    layer = LayerRotation("in", 8, 6, kind="neumann", generator=packed(1, 6, 8, 1.3))
    layer.check_strength(Strength(1.0))
    layer.check_strength(Strength(0.0))
    layer.check_strength(Strength(0.5, "linear"))
    with pytest.raises(StrengthError, match="diverges"):
        layer.check_strength(Strength(0.5), module="m")
    replace(layer, clip=0.9, _cache={}).check_strength(Strength(0.5))


def test_a_stored_half_turn_has_no_power() -> None:
    flip = torch.eye(4).repeat(1, 12, 1, 1)
    flip[0, 0, 0, 0] = flip[0, 0, 1, 1] = -1
    layer = LayerRotation("out", 4, 12, kind="matrix", matrix=flip)
    layer.check_strength(Strength(1.0))
    layer.check_strength(Strength(0.5, "linear", 180.0))
    for strength in (Strength(0.5), Strength(1.0, "rotation", 90.0), Strength(0.5, "linear", 90.0)):
        with pytest.raises(StrengthError, match="180"):
            layer.check_strength(strength)


# ------------------------------------------------------------------ COFT


def limited(limit: float, per_block: bool = False, smooth: bool = False) -> LayerRotation:
    layer = EXACT["out"]
    q = unpack_skew(layer.generator[0].double(), 8)
    norm = q.flatten(1).norm(dim=1) if per_block else q.norm()
    return replace(layer, constraint=Constraint("test", limit, norm.float(), smooth), _cache={})


def generator_norm(m: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of each block's Cayley generator, from the dense matrix."""
    blocks = torch.stack([m[8 * i : 8 * i + 8, 8 * i : 8 * i + 8] for i in range(6)])
    eye = torch.eye(8, dtype=m.dtype)
    return torch.stack([torch.linalg.solve(x + eye, x - eye).norm() for x in blocks])


@pytest.mark.parametrize("smooth", [False, True])
def test_file_limit_acts_before_strength_and_hold_after(smooth: bool) -> None:
    layer = limited(1.0, smooth=smooth)
    at = {s: generator_norm(dense(layer, Strength(s, coft="file"))).norm() for s in (1.0, 2.0)}
    assert at[1.0] == pytest.approx(1.0, rel=1e-4) and at[2.0] == pytest.approx(2.0, rel=1e-4)
    assert generator_norm(dense(layer, Strength(2.0, coft="hold"))).norm() == pytest.approx(1.0, rel=1e-4)
    free = generator_norm(dense(layer, Strength(1.0, coft="off"))).norm()
    assert float(free) == pytest.approx(float(layer.constraint.norm), rel=1e-4)


@pytest.mark.parametrize("s", [0.4, -1.0, 2.0, 5.0])
@pytest.mark.parametrize("per_block", [False, True])
def test_hold_limits_the_generator_of_a_power(per_block: bool, s: float) -> None:
    """Geodesic multiplies angles, so the generator of the power is not the generator times the strength."""
    layer = limited(0.5, per_block=per_block)
    norms = generator_norm(dense(layer, Strength(s, "geodesic", "hold")))
    free = generator_norm(dense(layer, Strength(s, "geodesic", "off")))
    if per_block:
        assert (norms - free.clamp_max(0.5)).abs().max() < 1e-4
    else:
        assert norms.norm() == pytest.approx(min(0.5, float(free.norm())), rel=1e-4)


@pytest.mark.parametrize("s", [0.5, 3.0])
def test_hold_limits_a_clipped_power(s: float) -> None:
    layer = replace(EXACT["out"], clip=0.4, _cache={})
    m = dense(layer, Strength(s, "geodesic", "hold"))
    top = math.tan(math.acos(float(torch.linalg.eigvals(m).real.min())) / 2)
    want = 0.4 if s > 1 else math.tan(s * math.atan(0.9))
    assert top == pytest.approx(min(0.4, want), abs=1e-4)


def test_limit_per_block() -> None:
    layer = limited(0.5, per_block=True)
    norms = generator_norm(dense(layer, Strength(1.0)))
    want = layer.constraint.norm.clamp_max(0.5).double()
    assert (norms - want).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["rotation", "geodesic", "linear"])
def test_degrees_cap_the_largest_angle(mode: str) -> None:
    layer = EXACT["in"]
    m = dense(layer, Strength(1.0, mode, 10.0))
    cosine = torch.linalg.eigvals(m).real.min()
    assert math.degrees(math.acos(float(cosine))) == pytest.approx(10.0, abs=0.05)
    wide = dense(layer, Strength(1.0, mode, 179.0))
    assert (wide - dense(layer, Strength(1.0, mode))).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["rotation", "geodesic"])
@pytest.mark.parametrize("name", ["in", "expm", "finished"])
@pytest.mark.parametrize(("s", "degrees"), [(3.0, 25.0), (-3.0, 25.0), (1.5, 100.0), (0.5, 35.0), (0.5, 120.0)])
def test_degrees_hold_at_any_strength(name: str, mode: str, s: float, degrees: float) -> None:
    layer = EXACT[name]
    m = dense(layer, Strength(s, mode, degrees))
    turned = math.degrees(math.acos(float(torch.linalg.eigvals(m).real.min())))
    free = math.degrees(replace(layer, _cache={}).reach(Strength(s, mode)))
    assert turned == pytest.approx(min(degrees, free), abs=0.05)
    assert math.degrees(layer.reach(Strength(s, mode, degrees))) == pytest.approx(turned, abs=0.05)


@pytest.mark.parametrize("s", [0.5, -1.0, 2.0])
def test_a_limit_on_finished_matrices_leaves_linear_linear(s: float) -> None:
    layer, eye = EXACT["finished"], torch.eye(N, dtype=torch.float64)
    for degrees in (30.0, 179.0):
        whole = dense(layer, Strength(1.0, "linear", degrees))
        assert (dense(layer, Strength(s, "linear", degrees)) - (eye + s * (whole - eye))).abs().max() < 2e-6


def test_spectral_clip() -> None:
    layer = replace(SERIES["strong"], clip=0.4, _cache={})
    q = unpack_skew(layer.generator[0].double(), 8)
    top = torch.linalg.matrix_norm(q, 2)
    q = q * (0.4 / top.clamp_min(0.4))[:, None, None]
    eye = torch.eye(8, dtype=q.dtype)
    want = torch.block_diag(*((eye + q) @ (eye + q) @ (eye + q @ q)))
    assert (dense(layer, Strength(1.0)) - want).abs().max() < 1e-6


@pytest.mark.parametrize("value", ["fiel", "-3", "0", "nan", "181", ""])
def test_bad_coft_choices(value: str) -> None:
    with pytest.raises(StrengthError):
        Strength(1.0, "rotation", value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_strength_must_be_finite(value: float) -> None:
    with pytest.raises(StrengthError):
        Strength(value)


# ------------------------------------------------------------------ application


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_one_rounding_of_float32(name: str, dtype: torch.dtype) -> None:
    got, want = weight(dtype), weight(dtype).float()
    ALL[name].apply_(got, Strength(0.7))
    ALL[name].apply_(want, Strength(0.7))
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("shape", [(N, 5, 3, 3), (N, 16, 3), (N, 2, 3, 2, 2), (N, 7)])
def test_convolutions_are_their_flattened_rows(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    flat = w.flatten(1).clone()
    got = w.clone()
    EXACT["out"].apply_(got, Strength(0.6))
    EXACT["out"].apply_(flat, Strength(0.6))
    assert torch.equal(got.flatten(1), flat)


def test_large_weights_go_through_many_chunks() -> None:
    g = torch.Generator().manual_seed(4)
    for side, shape in (("out", (1280, 3000)), ("in", (3000, 1280))):
        for b in (16, 320):
            n = 1280 // b
            v = torch.randn(1, n, b * (b - 1) // 2, generator=g) * 0.05
            layer = LayerRotation(side, b, n, generator=v)
            w = torch.randn(shape, generator=g)
            m = torch.block_diag(*cayley(unpack_skew(v[0].double(), b)))
            want = m @ w.double() if side == "out" else w.double() @ m.T
            layer.apply_(w, Strength())
            assert (w - want).abs().max() < 1e-5


def test_row_slices_and_strided_weights() -> None:
    big = torch.randn(3 * N, N, generator=torch.Generator().manual_seed(3))
    want = big.clone()
    part = want[N : 2 * N].clone()
    EXACT["out"].apply_(part, Strength())
    want[N : 2 * N] = part
    EXACT["out"].apply_(big.narrow(0, N, N), Strength())
    assert torch.equal(big, want)
    image = torch.randn(N, 8, 3, 3).to(memory_format=torch.channels_last)
    plain = image.clone(memory_format=torch.contiguous_format)
    EXACT["out"].apply_(image, Strength())
    EXACT["out"].apply_(plain, Strength())
    assert torch.equal(image, plain)


@pytest.mark.parametrize(
    "strength", [Strength(2.0, "geodesic", "hold"), Strength(-0.7, "geodesic", "hold"), Strength(0.5, "core"), Strength(2.0, "rotation", "hold")]
)
def test_slices_keep_to_the_limit_of_the_whole_layer(strength: Strength) -> None:
    """A fused layer's file on a model that has its parts apart: the blocks differ much in size, the limit is on all of them."""
    generator = packed(1, 6, 8, 0.5) * torch.tensor([5.0, 4.0, 1.0, 1.0, 0.3, 0.3]).view(1, 6, 1)
    limit = Constraint("whole layer", 0.8, (2 * generator.double().square().sum()).sqrt().float())
    whole = LayerRotation("out", 8, 6, generator=generator, constraint=limit, core_alpha=0.8)
    weight = torch.randn(N, 5, generator=torch.Generator().manual_seed(3))
    truth, parts = weight.clone(), weight.clone()
    whole.apply_(truth, strength)
    for start, length in ((0, 16), (16, 32)):
        part = whole.rows_slice(start, length)
        if start:
            part = LayerRotation.from_state(*part.rows_slice(0, length).to_state())
        part.apply_(parts[start : start + length], strength)
    assert torch.allclose(parts, truth, atol=1e-6)
    assert not torch.allclose(truth, weight, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_weights_saturate(dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    w = torch.full((N, N), top).to(dtype)
    EXACT["out"].apply_(w, Strength())
    assert torch.isfinite(w.float()).all() and w.float().abs().max() == top


def test_batched_building_equals_single() -> None:
    layers = [*ALL.values(), Diff(torch.zeros(2))]
    for s, mode in ((0.4, "rotation"), (1.0, "rotation"), (-2.0, "geodesic"), (0.5, "linear")):
        strength = Strength(s, mode)
        for layer, built in zip(layers, build_all(layers, strength), strict=True):
            alone = layer.build(strength)
            assert (built is None) == (alone is None)
            if built is not None:
                assert torch.equal(built.matrices, alone.matrices) and built.order == alone.order
    assert build_all(layers, Strength(0.0)) == [None] * len(layers)


@pytest.mark.parametrize("name", ALL)
def test_state_round_trip(name: str) -> None:
    layer = ALL[name]
    again = type(layer).from_state(*layer.to_state())
    got, want = weight(), weight()
    again.apply_(got, Strength(0.5))
    layer.apply_(want, Strength(0.5))
    assert torch.equal(got, want)


def test_a_zero_generator_is_the_identity() -> None:
    layer = LayerRotation("in", 8, 6, generator=torch.zeros(1, 6, 28))
    for mode in ("rotation", "geodesic", "linear"):
        for coft in ("file", "hold", 5.0):
            assert (dense(layer, Strength(0.5, mode, coft)) - torch.eye(N)).abs().max() < 1e-6


# ------------------------------------------------------------------ numbers of any size


def wild(seed: int) -> LayerRotation:
    """A layer of an exact kind whose generator has any size up to the largest that is read, alike or of many sizes in one block."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    butterfly = r.choice(["", "", "", "lycoris", "peft"])
    b, n, stages = (r.choice([2, 4, 8]), 4, r.choice([1, 2, 3])) if butterfly else (r.choice([2, 3, 5, 8, 16, 17, 32, 64]), r.choice([1, 3]), 1)
    v = torch.randn(stages, n, b * (b - 1) // 2, generator=g)
    spread = r.choice(["", "numbers", "blocks", "sparse"])
    if spread == "sparse":
        v *= torch.rand(v.shape, generator=g) < 0.2
    elif spread:
        v *= 10 ** (torch.rand(v.shape if spread == "numbers" else (stages, n, 1), generator=g) * 20 - 16)
    top = v.double().norm(dim=-1).max().clamp_min(1e-30)
    v = (v * (10 ** r.choice([r.uniform(-30, 0), r.uniform(0, 8.99)]) / top)).float()
    limit = r.choice([0.0, 10 ** r.uniform(-10, 9)])
    norm = (2 * v.double().square().sum()).sqrt().float()
    return LayerRotation(
        r.choice(["in", "out"]), b, n, r.choice(["cayley", "expm"]), generator=v, butterfly=butterfly,
        constraint=Constraint("test", limit, norm, r.random() < 0.5) if r.random() < 0.4 else None, clip=limit if r.random() < 0.2 else None,
    )


@pytest.mark.parametrize("seed", range(60))
def test_what_is_read_is_orthogonal_whatever_its_size(seed: int) -> None:
    layer = wild(seed)
    layer.check_values()
    eye = torch.eye(layer.axis)
    for mode in ("rotation", "geodesic", "linear"):
        for s in (-2.0, 0.37, 1.0, 2.0) if mode != "linear" else (1.0,):
            for coft in ("file", "hold", 30.0):
                strength, w = Strength(s, mode, coft), eye.clone()
                try:
                    layer.check_strength(strength)
                    layer.apply_(w, strength)
                except StrengthError:  # a product of factors that turns a plane by 180 degrees has no power
                    assert layer.butterfly and mode == "geodesic"
                    continue
                assert (w.double().T @ w.double() - eye.double()).abs().max() <= 1e-5, (mode, s, coft)


def test_planes_of_very_different_size_in_one_block() -> None:
    """One plane of 4e8 beside small ones: a Gram matrix in float64 forgets the small ones."""
    v = torch.zeros(1, 1, 120)
    v[0, 0, ::7], v[0, 0, 3] = 0.3, 4e8
    for kind in ("cayley", "expm"):
        layer = LayerRotation("out", 16, 1, kind, generator=v)
        for strength in (Strength(1.0), Strength(-2.0), Strength(2.0, "geodesic"), Strength(0.5, "geodesic")):
            w = torch.eye(16)
            layer.apply_(w, strength)
            assert (w.T @ w - torch.eye(16)).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"generator": packed(1, 6, 8, 2e9)}, "generator of norm"),
        ({"row_scale": torch.full((N,), 2e9)}, "factors of size"),
        ({"col_scale": torch.full((N,), -2e9)}, "factors of size"),
        ({"added": torch.full((N, N), 2e9)}, "a difference of size"),
        ({"generator": None, "kind": "matrix", "matrix": torch.full((1, 6, 8, 8), 2e9)}, "matrices of size"),
    ],
)
def test_numbers_too_large_for_a_weight_are_refused(part: dict, words: str) -> None:
    with pytest.raises(ValueFault, match=words) as fault:
        replace(EXACT["out"], **part, _cache={}).check_values(module="m.to_q", file="a.safetensors")
    assert "m.to_q" in str(fault.value) and "a.safetensors" in str(fault.value)
    with pytest.raises(ValueFault, match="a difference of size"):
        Diff(torch.full((2, 2), 1e30)).check_values(module="m")


def test_factors_stay_finite_at_every_strength() -> None:
    scale = torch.ones(N)
    scale[:4] = torch.tensor([9e8, 1e-30, 1e-12, 0.0])
    layer = replace(EXACT["in"], row_scale=scale, _cache={})
    layer.check_values()
    for s in (-2.0, -1.0, 2.0):
        assert torch.isfinite(dense(layer, Strength(s))).all()


def test_a_singular_matrix_has_no_negative_strength() -> None:
    matrix = finished(6, 8, False)
    matrix[0, 2, 3] = 0.0  # a row of zeros
    layer = LayerRotation("out", 8, 6, kind="matrix", matrix=matrix)
    for allowed in (Strength(0.5), Strength(1.0), Strength(-1.0, "linear")):
        layer.check_strength(allowed)
        assert torch.isfinite(dense(layer, allowed)).all()
    for mode in ("rotation", "geodesic"):
        with pytest.raises(StrengthError, match="no inverse"):
            layer.check_strength(Strength(-1.0, mode))


def test_a_range_of_a_series_is_found_without_all_its_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of this block lies above 1, its largest lam far below: power sums tell."""
    layer = LayerRotation("in", 32, 2, kind="neumann", generator=packed(1, 2, 32, 0.7))
    assert layer.lam_bound() > 1
    monkeypatch.setattr("oft_core.spectra.lambdas", None)
    layer.check_strength(Strength(0.5))
    layer.check_values()
