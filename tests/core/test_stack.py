"""Blending: one rotation for several adapters, against dense matrix logarithms of another library."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from oft_core import AdapterError, Diff, LayerRotation, Patch, StackError, Strength, read_tensors
from oft_core.rotation import unpack_skew
from oft_core.stack import Share, blend, holds_oft

N = 24
SHAPES = {"w": (N, N)}


def layer(block: int, seed: int, side: str = "out", lam: float = 0.5, **more) -> LayerRotation:
    g = torch.Generator().manual_seed(seed)
    n = more.pop("stored", N // block)
    v = torch.randn(1, n, block * (block - 1) // 2, generator=g)
    v = v * lam / torch.linalg.matrix_norm(unpack_skew(v, block), 2).amax()
    return LayerRotation(side, block, N // block, generator=v, **more)


def share(op, value=1.0, mode="rotation", key="w", rows=None, **more) -> Share:
    return Share(Patch("m", key, op, rows=rows), Strength(value, mode, **more), "a.safetensors")


def dense(shares: list[Share], key: str = "w", weight: torch.Tensor | None = None) -> torch.Tensor:
    """What shares or patches make of a weight, one after the other (the identity if none is given)."""
    weight = torch.eye(N) if weight is None else weight.clone()
    for one in shares:
        patch, at = (one, Strength()) if isinstance(one, Patch) else (one.patch, one.strength)
        if patch.key == key:
            patch.apply_(weight, at)
    return weight


def logm(m: torch.Tensor) -> torch.Tensor:
    linalg = pytest.importorskip("scipy.linalg")
    return torch.from_numpy(linalg.logm(m.double().numpy()).real)


KINDS = {
    "cayley": layer(8, 1),
    "one stored": layer(8, 2, stored=1),
    "input side": layer(6, 3, "in"),
    "expm": layer(8, 4, kind="expm"),
    "series": layer(8, 5, kind="neumann"),
    "strong series": layer(8, 5, kind="neumann", lam=0.9),
    "finished": LayerRotation("out", 8, 3, kind="matrix", matrix=layer(8, 6).build(Strength()).matrices),
    "rescaled": layer(8, 7, row_scale=torch.linspace(0.5, 2, N)),
}


@pytest.mark.parametrize("mode", ["rotation", "geodesic"])
@pytest.mark.parametrize(
    ("name", "s"),
    # Row factors act before a rotation of negative strength, but after a blend: such a file has no equal there.
    [(n, s) for n in KINDS for s in (1.0, 0.4, -0.7, 1.6) if n != "rescaled" or s > 0],
)
def test_alone_it_is_the_file_itself(name: str, s: float, mode: str) -> None:
    one = share(KINDS[name], s, mode)
    patches = blend([one], 1, SHAPES)
    torch.testing.assert_close(dense(patches), dense([one]), atol=2e-6, rtol=0)
    assert patches[0].op.exact == ("series" not in name), "what is orthogonal stays so at every strength"


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("blocks", [(8, 8), (4, 6), (3, 8), (2, 24)])
def test_it_is_the_mean_of_the_logarithms(blocks: tuple[int, int], side: str) -> None:
    strengths = (0.8, -1.3)
    shares = [share(layer(b, i, side), s) for i, (b, s) in enumerate(zip(blocks, strengths, strict=True))]
    expected = torch.matrix_exp(sum(logm(dense([s])) for s in shares) / 2)
    patches = blend(shares, 2, SHAPES)
    assert len(patches) == 1
    assert patches[0].op.block == math.lcm(*blocks)
    torch.testing.assert_close(dense(patches).double(), expected, atol=2e-6, rtol=0)
    turned = dense(patches).double()
    torch.testing.assert_close(turned @ turned.T, torch.eye(N, dtype=torch.float64), atol=2e-6, rtol=0)
    assert (dense(shares) - dense(shares[::-1])).abs().max() > 0.05 or blocks == (2, 24), "composing them does depend on it"


def test_order_does_not_matter() -> None:
    shares = [
        share(layer(8, 1), 0.7), share(layer(4, 2, "in"), 1.4), share(layer(6, 3), -0.5, "geodesic"),
        share(Diff(torch.ones(N, N)), 0.3), share(layer(12, 4, "in"), 0.9, coft=5.0),
    ]
    weight = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    results = [dense(blend(order, 4, SHAPES), weight=weight) for order in itertools.permutations(shares)]
    for one in results[1:]:
        torch.testing.assert_close(one, results[0], atol=2e-6, rtol=0)
    composed = [dense(list(order), weight=weight) for order in (shares, shares[::-1])]
    assert (composed[0] - composed[1]).abs().max() > 0.1, "composing them does depend on it"


def test_adapters_of_different_modes() -> None:
    """Each enters with the logarithm of what it is at its own strength in its own mode."""
    shares = [share(layer(8, 1, lam=0.9), 0.4, "rotation"), share(layer(6, 2, lam=0.9), 1.6, "geodesic")]
    expected = torch.matrix_exp(sum(logm(dense([s])) for s in shares) / 2)
    for order in (shares, shares[::-1]):
        torch.testing.assert_close(dense(blend(order, 2, SHAPES)).double(), expected, atol=2e-6, rtol=0)
    for mode in ("rotation", "geodesic"):
        alike = [replace(s, strength=replace(s.strength, mode=mode)) for s in shares]
        assert (dense(blend(alike, 2, SHAPES)).double() - expected).abs().max() > 0.01, "the modes must show"
    straight = replace(shares[1], strength=replace(shares[1].strength, mode="linear"), adapter="straight.safetensors")
    with pytest.raises(StackError, match="linear") as refused:
        blend([shares[0], straight], 2, SHAPES)
    for words in ("straight.safetensors", "rotation or geodesic", "compose"):
        assert words in str(refused.value)
    assert "a.safetensors" not in str(refused.value), "only the one that cannot be is named"


def test_twice_the_same_is_the_same_and_nothing_counts_as_no_turn() -> None:
    one = share(layer(8, 1))
    torch.testing.assert_close(dense(blend([one, one], 2, SHAPES)), dense([one]), atol=2e-6, rtol=0)
    half = dense([share(layer(8, 1), 0.5, "geodesic")])
    torch.testing.assert_close(dense(blend([one], 2, SHAPES)), half, atol=2e-6, rtol=0)
    still = share(layer(8, 2), 0.0)
    torch.testing.assert_close(dense(blend([one, still], 2, SHAPES)), half, atol=2e-6, rtol=0)


def test_both_sides_stay_apart() -> None:
    left, right = share(layer(8, 1)), share(layer(6, 2, "in"))
    weight = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    expected = torch.matrix_exp(logm(dense([left])) / 2) @ weight.double() @ torch.matrix_exp(logm(dense([right])) / 2)
    torch.testing.assert_close(dense(blend([left, right], 2, SHAPES), weight=weight).double(), expected, atol=5e-6, rtol=0)


def test_row_factors_become_their_geometric_mean() -> None:
    first, second = torch.linspace(0.5, 2, N), torch.linspace(3, 1, N)
    shares = [share(layer(8, 1, row_scale=first)), share(layer(8, 2, row_scale=second), 0.5), share(layer(8, 3))]
    bare = [replace(s, patch=replace(s.patch, op=replace(s.patch.op, row_scale=None, _cache={}))) for s in shares]
    expected = (first * second.sqrt()).pow(1 / 3).unsqueeze(1) * dense(blend(bare, 3, SHAPES))
    torch.testing.assert_close(dense(blend(shares, 3, SHAPES)), expected, atol=3e-6, rtol=0)


def test_differences_are_averaged() -> None:
    one, two = torch.full((N, N), 1.0), torch.full((N, N), 4.0)
    got = dense(blend([share(Diff(one), 1.0), share(Diff(two), 0.5)], 2, SHAPES), weight=torch.zeros(N, N))
    torch.testing.assert_close(got, torch.full((N, N), 1.5))


def test_differences_of_a_convolution_may_come_with_or_without_its_kernel_size() -> None:
    one, two = torch.randn(N, N), torch.randn(N, N)
    (patch,) = blend([share(Diff(one[..., None, None]), 1.0), share(Diff(two), 0.5)], 2, {"w": (N, N, 1, 1)})
    assert torch.allclose(patch.op.delta, (one / 2 + two / 4)[..., None, None])


@pytest.mark.parametrize("side", ["out", "in"])
def test_fused_in_one_file_and_split_in_another(side: str) -> None:
    """A whole rotation meets one of the middle third only; the last third belongs to the first alone."""
    big = {"w": (3 * N, N)}
    n = 9 if side == "out" else 3
    whole = LayerRotation(side, 8, n, generator=torch.randn(1, n, 28, generator=torch.Generator().manual_seed(1)) * 0.1)
    part = layer(8, 2, side)
    weight = torch.randn(3 * N, N, generator=torch.Generator().manual_seed(0))
    got = dense(blend([share(whole), share(part, 0.6, rows=(N, N))], 2, big), weight=weight)
    for i in range(3):
        rows = slice(i * N, (i + 1) * N)
        shares = [share(whole.rows_slice(i * N, N))] + ([share(part, 0.6)] if i == 1 else [])
        torch.testing.assert_close(got[rows], dense(blend(shares, 2, SHAPES), weight=weight[rows]), atol=3e-6, rtol=0)
    with pytest.raises(AdapterError, match="across the parts"):
        blend([share(LayerRotation("out", 72, 1, generator=torch.zeros(1, 1, 72 * 71 // 2))), share(part, rows=(N, N))], 2, big)


REFUSED = {
    "mode 'linear'": share(layer(8, 1), mode="linear"),
    "BOFT": share(LayerRotation("out", 6, 4, generator=torch.zeros(2, 4, 15), butterfly="lycoris")),
    "DoRA": share(layer(8, 1, row_scale=torch.ones(N), norm_of="base")),
    "memory": share(layer(8, 1, memory_view=True)),
    "columns": share(layer(8, 1, col_scale=torch.ones(N))),
    "not positive": share(layer(8, 1, row_scale=torch.linspace(-1, 1, N))),
    "DoKr": share(layer(8, 1, added=torch.zeros(N, N))),
    "cut": share(LayerRotation("out", 7, 4, generator=torch.zeros(1, 4, 21), size=N)),
    "parameter whole": share(Diff(torch.ones(N, N), whole=True)),
    "180 degrees": share(
        LayerRotation("out", 4, 6, kind="matrix", matrix=torch.tensor([-1.0, -1, 1, 1]).diag().expand(1, 6, 4, 4).clone())
    ),
    "no rotation": share(LayerRotation("out", 8, 3, kind="matrix", matrix=torch.eye(8).expand(1, 3, 8, 8) * 1.1 + 0.1)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_average_is_refused_with_the_reason(words: str) -> None:
    with pytest.raises(AdapterError, match=words) as refused:
        blend([share(layer(8, 9)), REFUSED[words]], 2, SHAPES)
    text = str(refused.value)
    assert "a.safetensors" in text and "module: m" in text and "compose" in text


def test_blocks_that_only_meet_far_up_are_refused() -> None:
    def wide(block: int) -> Share:
        return share(LayerRotation("out", block, 1023 // block, generator=torch.zeros(1, 1023 // block, block * (block - 1) // 2)))

    with pytest.raises(AdapterError, match="31 and 33 only meet in blocks of 1023"):
        blend([wide(31), wide(33)], 2, {"w": (1023, 4)})


def test_oft_files_are_known_by_their_names(tmp_path) -> None:
    three = torch.zeros(2, 4, 4)
    names = (
        "lora_unet_a.oft_blocks", "oft_unet_a.oft_blocks.0", "a.oft_diag", "base_model.model.a.oft_R.weight",
        "base_model.model.a.oft_R.default.weight", "a.boft_R", "a.oft_r.default", "u.processor.to_q_oft.R",
    )
    for name in names:
        save_file({name: three, "lora_unet_b.lora_up.weight": three.clone()}, tmp_path / "x.safetensors")
        assert holds_oft(tmp_path / "x.safetensors"), name
    save_file({"lora_unet_b.lora_up.weight": three, "oft_R": three.clone()}, tmp_path / "x.safetensors")
    assert not holds_oft(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match="damaged"):
        holds_oft(tmp_path / "x.safetensors")


def test_a_whole_file_is_blended_layer_by_layer() -> None:
    from oft_core import NameIndex

    def file(seed: int, modules: tuple[str, ...]):
        g = torch.Generator().manual_seed(seed)
        tensors = {f"{m}.oft_blocks": torch.randn(3, 8, 8, generator=g) * 0.1 for m in modules}
        return read_tensors({**tensors, **{f"{m}.alpha": torch.tensor(0.0) for m in modules}}, {}, name=f"{seed}")

    index = NameIndex({"x.weight": (N, N), "y.weight": (N, N)})
    one, two = file(1, ("x", "y")).bind(index), file(2, ("y",)).bind(index)
    shares = [Share(p, Strength(0.5), b.adapter.name) for b in (one, two) for p in b.patches]
    patches = {p.key: p for p in blend(shares, 2, index.shapes)}
    assert set(patches) == {"x.weight", "y.weight"}
    for key, patch in patches.items():
        logs = [logm(dense([s], key)) for s in shares if s.patch.key == key]
        torch.testing.assert_close(dense([patch], key).double(), torch.matrix_exp(sum(logs) / 2), atol=2e-6, rtol=0)


# --- angles kept ---


def test_kept_angles_have_the_direction_of_the_average() -> None:
    """Against SciPy's matrix logarithm: the average's generator, as long as the adapters' are on average, block by block."""
    shares = [share(layer(8, 1), 0.8), share(layer(8, 2, lam=0.3)), share(layer(4, 3, lam=0.2))]
    logs = [logm(dense([one])) for one in shares]
    got = logm(dense(blend(shares, 3, SHAPES, keep_angles=True)))
    for i in range(0, N, 8):
        part = slice(i, i + 8)
        mean = sum(log[part, part] for log in logs) / 3
        size = sum(log[part, part].norm() for log in logs) / 3
        assert mean.norm() < 0.8 * size, "nothing would be kept here"
        assert torch.allclose(got[part, part], mean * size / mean.norm(), atol=1e-5)


def test_kept_angles_of_one_file_are_its_own() -> None:
    one = share(layer(8, 1), 0.7)
    want = dense([one])
    assert torch.allclose(dense(blend([one, one], 2, SHAPES, keep_angles=True)), want, atol=1e-5)
    assert torch.allclose(dense(blend([one], 2, SHAPES, keep_angles=True)), want, atol=1e-5), "the other file lacks the layer"
    assert not torch.allclose(dense(blend([one], 2, SHAPES)), want, atol=1e-2)


def test_opposite_rotations_do_not_blow_up() -> None:
    shares = [share(layer(8, 1), 1.0), share(layer(8, 1), -0.99)]
    angle = logm(dense(blend(shares, 2, SHAPES, keep_angles=True))).norm()
    assert angle < 0.03 * logm(dense(shares[:1])).norm()
