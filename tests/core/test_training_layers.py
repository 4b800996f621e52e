"""The trained rotations: gradients, merging, freezing, dtypes, checkpointing, projections, selection."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from oft_core.constraint import Strength
from oft_core.layer import LayerRotation
from oft_core.rotation import lambdas, orthogonality_error, unpack_skew
from oft_core.training import ConfigError, OFTConfig, RotationBank
from oft_core.training.functions import CayleyOfPacked, RotatedConv, RotateLast, generator_scale, limit_lam_


class Block(nn.Module):
    """Linear layers with a shared input, a convolution, norms: the shapes that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 8)
        self.to_k = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.group = nn.GroupNorm(2, 6)
        self.to_out = nn.ModuleList([nn.Linear(24, 5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.to_q(x) * torch.tanh(self.to_k(x)))  # (B, 16, 8)
        y = self.group(self.conv(y.transpose(1, 2).reshape(-1, 4, 4, 8)))  # (B, 6, 2, 4)
        return self.to_out[0](y.flatten(2).reshape(y.shape[0], -1, 24))


TARGETS = {"target_modules": ["to_q", "to_k", "to_out.0"], "conv_modules": ["conv"]}


def make(dtype=torch.float32, seed=0, **options):
    """(model, input, bank with random rotations) for a configuration over all layers of Block."""
    torch.manual_seed(seed)
    model = Block().to(dtype)
    x = torch.randn(2, 16, 12, dtype=dtype)
    config = OFTConfig(**{"oft_block_size": 4, "init_weights": False, "angle_cap": None, **TARGETS, **options})
    bank = RotationBank({"unet": (model, config.select(model))}, seed=seed, dtype=torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        for name, p in bank.parameters.items():
            if "/rotation/" not in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model, x, bank


def merged(model: nn.Module, bank: RotationBank) -> nn.Module:
    """A copy of the model with what the bank exports applied to its parameters by the library."""
    out = copy.deepcopy(model)
    with torch.no_grad():
        for (_, module), pieces in bank.adapter_tensors().items():
            for piece in pieces:
                parameter = getattr(out.get_submodule(module), piece.param)
                piece.op.check_shape(parameter.shape, module=module)
                piece.op.apply_(parameter.data, Strength())
    return out


FORMS = [
    {},
    {"use_cayley_neumann": True},
    {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
    {"use_cayley_neumann": True, "num_cayley_neumann_terms": 7},
    {"scaled": False},
    {"block_share": True},
    {"side": "output", "oft_block_size": 2},
    {"side": "output", "oft_block_size": 2, "block_share": True},
    {"rescale": True},
    {"bias": "all"},
    {"side": "output", "oft_block_size": 2, "rescale": True, "bias": "oft_only"},
    {"oft_block_size": 0, "r": 2},
    {"modules_to_save": ["norm"]},
]


# -------------------------------------------------------------------- gradients


def test_closed_form_derivatives_pass_gradcheck():
    torch.manual_seed(0)
    v = torch.randn(3, 10, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: CayleyOfPacked.apply(p, 5), (v,))
    x = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True)
    for n in (4, 1):
        m = torch.randn(n, 2, 2, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, m: RotateLast.apply(x, m, torch.double), (x, m))
    for shape, k in (((2, 4, 6), 1), ((2, 4, 5, 6), 2), ((1, 2, 4, 4, 4), 3)):
        w = torch.randn(6, shape[1], *[3] * k, dtype=torch.double)
        x = torch.randn(shape, dtype=torch.double, requires_grad=True)
        for n in (shape[1] * 3**k // 6, 1):
            m = torch.randn(n, 6, 6, dtype=torch.double, requires_grad=True)
            how = ([2] * k, [1] * k, [1] * k)
            assert torch.autograd.gradcheck(lambda x, m, w=w, h=how: RotatedConv.apply(x, w, m, torch.double, *h), (x, m))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_gradient_of_every_form_against_finite_differences(options):
    """The whole way of a step (build, leaves, wrapped forwards, collected backward) in float64."""
    model, x, bank = make(torch.float64, **options)
    direction = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))[:, :2]

    def loss() -> torch.Tensor:
        return (model(x) * direction).sum()

    with bank.installed():
        bank.begin_step()
        loss().backward()
        bank.finish_backward()
        grads = {n: p.grad.clone() for n, p in bank.parameters.items()}
        for name, p in bank.parameters.items():
            way = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(4))
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    p.add_(way, alpha=step)
                    with bank.evaluation():
                        values.append(loss().item())
                    p.sub_(way, alpha=step)
            numeric = (values[0] - values[1]) / 2e-6
            analytic = (grads[name] * way).sum().item()
            assert math.isclose(analytic, numeric, rel_tol=1e-6, abs_tol=1e-8), name
            assert abs(analytic) > 1e-6, name


# -------------------------------------------------------------------- merging


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_exported_and_merged_equals_the_trained_forward(options):
    model, x, bank = make(**options)
    base = model(x)
    with bank.installed():
        bank.begin_step()
        trained = model(x).detach()
        with bank.evaluation() if not bank.abandon_step() else None:
            again = model(x)
    assert torch.equal(trained, again)
    assert (trained - base).abs().max() > 0.05
    torch.testing.assert_close(merged(model, bank)(x), trained, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_convolutions_of_every_dimension_merge_as_they_train(kind, side):
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[kind - 1]
    model = nn.Sequential(
        layer(4, 6, 3, stride=2, padding=1, dilation=1), nn.Tanh(), layer(6, 4, 3, padding="same"),
        layer(4, 4, 3, padding=2, dilation=2, padding_mode="circular"),
    )
    config = OFTConfig(
        oft_block_size=2, init_weights=False, target_modules=None, conv_modules="all-conv", side=side, rescale=True, angle_cap=None
    )
    bank = RotationBank({"unet": (model, config.select(model))})
    x = torch.randn(2, 4, *[8] * kind)
    with bank.installed(), bank.evaluation():
        trained = model(x)
    assert (trained - model(x)).abs().max() > 0.02
    torch.testing.assert_close(merged(model, bank)(x), trained, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [{"oft_block_size": 4}, {"oft_block_size": 8}, {"oft_block_size": 0, "r": 1}])
def test_output_side_of_a_grouped_convolution_and_its_refusal_on_the_input_side(size):
    """Rows of different groups see different channels: a block that mixed them could be trained, but not be merged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    options = {"init_weights": False, "target_modules": ["0"], **size}
    with pytest.raises(ConfigError, match="grouped convolution"):
        OFTConfig(**options).select(model)
    chosen = OFTConfig(side="output", **options).select(model)
    assert [c.block for c in chosen.layers] == [4]
    bank = RotationBank({"unet": (model, chosen)})
    x = torch.randn(1, 4, 6, 6)
    with bank.installed(), bank.evaluation():
        trained = model(x)
    torch.testing.assert_close(merged(model, bank)(x), trained, rtol=1e-5, atol=1e-5)


def test_depthwise_convolutions_are_left_out_with_the_reason():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    chosen = OFTConfig(side="output", oft_block_size=4, target_modules=None, conv_modules="all-conv").select(model)
    assert [c.name for c in chosen.layers] == ["1"]
    assert "8 groups of 1 have no block size near 4" in str(chosen)


def test_weights_stored_transposed():
    """GPT-2's Conv1D: the export says the other side, so that the stored weight is merged right."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    for side in ("input", "output"):
        model = nn.Sequential(conv1d(6, 8))
        config = OFTConfig(oft_block_size=2, init_weights=False, target_modules=["0"], side=side, rescale=True)
        bank = RotationBank({"te1": (model, config.select(model))})
        bank.parameters["te1/scale"].data.uniform_(-0.3, 0.3)
        x = torch.randn(3, 8)
        with bank.installed(), bank.evaluation():
            trained = model(x)
        torch.testing.assert_close(merged(model, bank)(x), trained, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- frozen weights, install and uninstall


def test_base_is_bit_identical_afterwards_also_after_an_exception():
    model, x, bank = make(rescale=True, bias="all", modules_to_save=["group"])
    before = {n: p.clone() for n, p in model.state_dict().items()}
    out = model(x)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    keys = {n: set(m.__dict__) for n, m in model.named_modules()}
    for fail in (False, True):
        try:
            with bank.installed():
                assert not any(p.requires_grad for p in model.parameters())
                bank.begin_step()
                model(x).square().sum().backward()
                if fail:
                    raise KeyboardInterrupt
                bank.finish_backward()
        except KeyboardInterrupt:
            assert fail
        assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert {n: set(m.__dict__) for n, m in model.named_modules()} == keys
        assert torch.equal(model(x), out)


def test_a_forward_that_someone_else_put_on_the_module_stays():
    model, x, bank = make()
    calls = []
    inner = model.to_q.forward
    model.to_q.forward = lambda x: calls.append(1) or inner(x)
    mine = model.to_q.forward
    with bank.installed(), bank.evaluation():
        model(x)
    assert calls and model.to_q.forward is mine


def test_an_exception_while_installing_leaves_nothing_behind():
    model, _, bank = make()
    bank._slots["unet", "broken"] = bank._slots["unet", "to_q"].__class__(module=object())
    with pytest.raises(AttributeError), bank.installed():
        pass
    assert "forward" not in model.to_q.__dict__ and all(p.requires_grad for p in model.parameters())


def test_disabled_is_the_frozen_model():
    model, x, bank = make(modules_to_save=["norm"])
    base = model(x)
    with bank.installed():
        bank.begin_step()
        assert not torch.equal(model(x), base)
        with bank.disabled():
            assert torch.equal(model(x), base)
        assert not torch.equal(model(x), base)


def test_identity_at_the_start():
    model, x, bank = make(init_weights=True)
    with bank.installed(), bank.evaluation():
        torch.testing.assert_close(model(x), Block.forward(model, x), rtol=0, atol=0)


# -------------------------------------------------------------------- memory, checkpointing, dtypes


def test_rotations_are_built_once_a_step_whatever_is_accumulated(monkeypatch):
    from oft_core.training import functions

    model, x, bank = make()
    built = []
    monkeypatch.setattr(functions, "cayley", lambda q, real=functions.cayley: built.append(len(q)) or real(q))
    with bank.installed():
        bank.begin_step()
        for _ in range(3):
            checkpoint(model, x, use_reentrant=False).sum().backward()
        bank.finish_backward()
    assert len(built) == 1


@pytest.mark.parametrize("options", [{}, {"side": "output", "oft_block_size": 2}, {"rescale": True, "bias": "all", "module_dropout": 0.5}])
def test_checkpointing_gives_the_same_gradients(options):
    model, x, bank = make(**options)
    grads = []
    with bank.installed():
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            bank.begin_step(7)
            run(x).square().sum().backward()
            bank.finish_backward()
            grads.append({n: p.grad.clone() for n, p in bank.parameters.items()})
            bank.abandon_step()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    assert any(g.abs().max() > 0 for g in grads[0].values())


def test_layers_with_one_input_keep_it_once():
    """q and k rotate the same x; nothing of x's size but x itself is kept for the backward pass."""
    x = torch.randn(2, 64, 32, requires_grad=True)
    m = torch.randn(8, 4, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for _ in range(3):
            RotateLast.apply(x, m, torch.bfloat16)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), m.data_ptr()}


def test_no_gradient_is_computed_for_frozen_weights():
    model, x, bank = make()
    with bank.installed():
        bank.begin_step()
        loss = model(x).sum()
        seen, queue = set(), [loss.grad_fn]
        frozen = {id(p) for p in model.parameters()}
        while queue:
            node = queue.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            assert id(getattr(node, "variable", None)) not in frozen
            queue += [n for n, _ in node.next_functions]
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_train_with_float32_generators(dtype, side):
    options = {"side": side, "oft_block_size": 2, "rescale": True}
    model, x, bank = make(**options)
    half, halfx, half_bank = make(dtype, **options)
    results = []
    for m, data, b in ((model, x, bank), (half, halfx, half_bank)):
        with b.installed():
            b.begin_step()
            y = m(data)
            y.float().square().sum().backward()
            b.finish_backward()
            results.append((y.detach().float(), b.parameters["unet/rotation/2"].grad.clone()))
            assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in b.parameters.values())
    assert y.dtype == dtype
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.006
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).norm() / exact.norm() < tolerance


def test_autocast_does_not_reach_the_rotation():
    model, x, bank = make()
    with bank.installed(), torch.autocast("cpu", torch.bfloat16):
        bank.begin_step()
        assert all(b.out.dtype == torch.float32 for b in bank._built.values())
        r = bank._built["unet/rotation/4"].out.detach()
        assert orthogonality_error(r.double()).max() < 1e-5
        y = model.to_q(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        bank.finish_backward()
        assert bank.parameters["unet/rotation/4"].grad.abs().max() > 0


def test_8_bit_float_weights():
    """Convolutions with fp8 weights rotate the kernel in float32; linear layers leave the weight to the layer's own forward."""

    class Fp8Linear(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": Fp8Linear(8, 6), "conv": nn.Conv2d(4, 6, 3)})
    wide = copy.deepcopy(model)
    for m, w in zip(model.values(), wide.values(), strict=True):
        m.weight = nn.Parameter(m.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
        w.weight.data = m.weight.data.float()
    results = []
    for net in (model, wide):
        config = OFTConfig(oft_block_size=4, init_weights=False, target_modules=["lin"], conv_modules=["conv"])
        bank = RotationBank({"unet": (net, config.select(net))}, seed=5)
        torch.manual_seed(1)
        with bank.installed():
            bank.begin_step()
            loss = net["lin"](torch.randn(3, 8)).square().sum() + net["conv"](torch.randn(1, 4, 5, 5)).square().sum()
            loss.backward()
            bank.finish_backward()
            results.append(bank.parameters["unet/rotation/4"].grad.clone())
    torch.testing.assert_close(results[0], results[1])
    assert (results[0].abs().amax(1) > 0).all()


def test_a_packed_convolution_is_refused_by_name_unless_the_host_unpacks_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    plain = model[0].weight.detach().clone()
    model[0].weight = nn.Parameter(plain.flatten().mul(100).to(torch.int8), requires_grad=False)
    config = OFTConfig(oft_block_size=4, init_weights=False, target_modules=["0"])
    x = torch.randn(1, 4, 5, 5)
    bank = RotationBank({"unet": (model, config.select(model))})
    with bank.installed(), bank.evaluation(), pytest.raises(ConfigError, match="packed"):
        model(x)
    bank = RotationBank({"unet": (model, config.select(model))}, weight_of=lambda m: plain)
    with bank.installed(), bank.evaluation():
        assert model(x).isfinite().all()


# -------------------------------------------------------------------- limits and dropout


def train(model, x, bank, steps=30, lr=0.05, seed=0):
    """A few AdamW steps towards a random target; every gradient is random enough to move all planes."""
    optimizer = torch.optim.AdamW(bank.parameters.values(), lr=lr)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    with bank.installed():
        for step in range(steps):
            bank.begin_step(step)
            (model(x) - target).square().sum().backward()
            bank.finish_backward()
            optimizer.step()
            optimizer.zero_grad()
            bank.after_step(optimizer)


def rotations(bank) -> list[LayerRotation]:
    return [p.op for pieces in bank.adapter_tensors().values() for p in pieces if isinstance(p.op, LayerRotation)]


def test_what_was_trained_is_orthogonal_to_1e_5():
    model, x, bank = make(init_weights=True, oft_block_size=4)
    train(model, x, bank, lr=0.2)
    angles = [float(r.angles().max()) for r in rotations(bank)]
    assert max(angles) > 0.5
    assert max(r.orthogonality_error() for r in rotations(bank)) < 1e-5
    with bank.installed():
        bank.begin_step()
        for built in bank._built.values():
            assert orthogonality_error(built.out.detach().double()).max() < 1e-5


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("options", [{"angle_cap": 20.0}, {"angle_cap": None, "spectral_clip": math.tan(math.radians(10))}])
def test_no_plane_turns_further_than_the_cap(options, scaled):
    model, x, bank = make(init_weights=True, scaled=scaled, **options)
    train(model, x, bank, lr=0.2 if scaled else 0.05)
    angles = torch.stack([torch.rad2deg(r.angles().max()) for r in rotations(bank)])
    assert angles.max() < 20.001 and angles.max() > 19.9
    model, x, bank = make(init_weights=True, scaled=scaled, angle_cap=None)
    train(model, x, bank, lr=0.2 if scaled else 0.05)
    assert max(float(torch.rad2deg(r.angles().max())) for r in rotations(bank)) > 30


def test_limit_touches_only_blocks_that_exceed_it():
    torch.manual_seed(0)
    packed = torch.randn(50, 28) * torch.linspace(0.01, 1, 50).unsqueeze(1)
    before = packed.clone()
    limit_lam_(packed, 0.8, 8)
    lam = lambdas(unpack_skew(before.double(), 8))[:, -1]
    after = lambdas(unpack_skew(packed.double(), 8))[:, -1]
    torch.testing.assert_close(after, lam.clamp_max(0.8), rtol=1e-5, atol=1e-6)
    assert torch.equal(packed[lam <= 0.8], before[lam <= 0.8]) and 5 < (lam > 0.8).sum() < 45
    # One plane only: the cheap bounds are exact here, so they must not let anything through.
    small = torch.linspace(0.7, 0.9, 50).unsqueeze(1)
    limit_lam_(small, 0.8, 2)
    assert 0.8 - 1e-6 < small.max() < 0.8 + 1e-6 and small[0] == 0.7


def test_coft_holds_for_what_is_exported_and_evaluated():
    model, x, bank = make(init_weights=True, coft=True, eps=0.05)
    train(model, x, bank, lr=0.2)
    for r in rotations(bank):
        norms = r.generator[0].double().norm(dim=1) * math.sqrt(2)
        assert norms.max() <= 0.05 / math.sqrt(r.stored) * (1 + 1e-6)
        assert norms.max() >= 0.05 / math.sqrt(r.stored) * 0.999
        assert r.constraint.use() <= 1 + 1e-6
    with bank.installed(), bank.evaluation():
        trained = model(x)
    torch.testing.assert_close(merged(model, bank)(x), trained, rtol=2e-5, atol=2e-5)


def test_block_dropout_depends_on_seed_and_step_only_and_spares_shared_blocks():
    _, _, bank = make(module_dropout=0.5)
    eye = torch.eye(4)

    def kept(bank, step):
        bank.begin_step(step)
        out = bank._built["unet/rotation/4"].out.detach()
        bank.abandon_step()
        return (out - eye).abs().amax((1, 2)) > 0

    first = kept(bank, 1)
    assert 0.2 < first.float().mean() < 0.8
    assert torch.equal(first, kept(bank, 1)) and not torch.equal(first, kept(bank, 2))
    with bank.installed():
        bank.begin_step(1)
        bank.finish_backward()
        with bank.evaluation():
            out = bank._built["unet/rotation/4"].out
            assert ((out - eye).abs().amax((1, 2)) > 0).all()
    _, _, shared = make(module_dropout=0.5, block_share=True)
    assert kept(shared, 1).all()


def test_scaled_parameters_turn_by_a_step_that_does_not_depend_on_the_block_size():
    """One Adam step of size lr moves the largest singular value by about lr, whatever the block size."""
    for b in (8, 32, 128):
        signs = torch.randn(4, b * (b - 1) // 2, generator=torch.Generator().manual_seed(0)).sign()
        moved = lambdas(unpack_skew(signs * 1e-3 * generator_scale(OFTConfig(), b), b))[:, -1]
        assert 0.6e-3 < moved.mean() < 1.1e-3


# -------------------------------------------------------------------- selection


def test_block_sizes_are_adjusted_as_peft_does_and_reported():
    model = nn.ModuleDict({"a": nn.Linear(12, 4), "b": nn.Linear(7, 4), "c": nn.Linear(8, 4), "d": nn.Linear(100, 4)})
    selection = OFTConfig(oft_block_size=8, target_modules="all-linear").select(model)
    assert {c.name: c.block for c in selection.layers} == {"a": 6, "b": 7, "c": 8, "d": 10}
    assert [c.name for c in selection.adjusted()] == ["a", "b", "d"]
    report = selection.report()
    assert "Block size 8 does not divide width 12: 6 is used in a" in report and "width 8" not in report
    assert selection.parameters == 2 * 15 + 21 + 28 + 10 * 45


def test_divisor_rule_is_petfs_own():
    peft_layer = pytest.importorskip("peft.tuners.oft.layer").OFTLayer
    from oft_core.training.selection import nearest_divisor

    for length in (1, 2, 7, 12, 77, 96, 320, 640, 768, 1000, 1280, 2880):
        for wanted in (1, 2, 3, 4, 7, 8, 16, 24, 32, 33, 64, 100, 999, 5000):
            assert nearest_divisor(length, wanted) == peft_layer.adjust_oft_parameters(None, length, wanted), (length, wanted)


def test_target_rules_match_pefts():
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    peft = pytest.importorskip("peft")
    names = [f"{top}.{i}.blocks.{j}.{leaf}" for top in ("down", "up") for i in (0, 1) for j in (0, 1, 2) for leaf in ("q", "k", "out.0")]
    model = named(*names)
    cases = [
        {"target_modules": ["q", "out.0"]},
        {"target_modules": r"up\..*\.(q|k)"},
        {"target_modules": ["q", "k"], "exclude_modules": ["1.q"]},
        {"target_modules": ["q"], "exclude_modules": r"down.*"},
        {"target_modules": ["q"], "layers_to_transform": 1},
        {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
        {"target_modules": ["q"], "layers_to_transform": [0, 2], "layers_pattern": ["blocks", "down"]},
        {"target_modules": ["q", "k"], "modules_to_save": ["up.1"]},
    ]
    for case in cases:
        theirs = peft.OFTConfig(oft_block_size=4, **copy.deepcopy(case))
        expected = {n for n in names if tuners.check_target_module_exists(theirs, n) is True or (
            isinstance(theirs.target_modules, str) and tuners.check_target_module_exists(theirs, n)
            and not isinstance(tuners.check_target_module_exists(theirs, n), tuners._ExcludedModule))}
        ours = {c.name for c in OFTConfig(oft_block_size=4, **case).select(model).layers}
        assert ours == expected and ours, case


def test_every_field_of_peft_is_here_with_help():
    peft = pytest.importorskip("peft")
    import dataclasses

    own = {f.name for f in dataclasses.fields(peft.OFTConfig)} - {f.name for f in dataclasses.fields(peft.PeftConfig)}
    ours = OFTConfig.help()
    assert own <= set(ours) and {"rank_pattern", "alpha_pattern"} <= set(ours)
    assert all(text for text in ours.values())
    assert OFTConfig(**OFTConfig(r=3, oft_block_size=0, bias="all").to_dict()) == OFTConfig(r=3, oft_block_size=0, bias="all")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 4}, ["'r'", "'oft_block_size'", "r = 4", "oft_block_size = 32"]),
        ({"oft_block_size": 0}, ["Exactly one"]),
        ({"oft_block_size": 1}, ["oft_block_size", "2 or more"]),
        ({"oft_block_size": 2.5}, ["oft_block_size", "whole number", "2.5"]),
        ({"module_dropout": 1.0}, ["module_dropout", "less than 1"]),
        ({"bias": "some"}, ["bias", "none or all or oft_only", "'some'"]),
        ({"side": "left"}, ["side", "input or output"]),
        ({"coft": "yes"}, ["coft", "True or False"]),
        ({"coft": True, "eps": 0.0}, ["eps", "more than 0"]),
        ({"angle_cap": 200.0}, ["angle_cap", "at most 180"]),
        ({"num_cayley_neumann_terms": 0}, ["num_cayley_neumann_terms", "at least 1"]),
        ({"num_cayley_neumann_terms": 1, "use_cayley_neumann": True}, ["num_cayley_neumann_terms", "2 or more"]),
        ({"rank_pattern": {"to_q[": 2}}, ["rank_pattern", "to_q[", "regular expression"]),
        ({"target_modules": None}, ["target_modules"]),
        ({"layers_pattern": "blocks"}, ["layers_to_transform"]),
        ({"rank_pattern": {"to_q": 0}}, ["rank_pattern", "1 or more"]),
        ({"spectral_clip": float("nan")}, ["spectral_clip", "number"]),
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(options, words):
    with pytest.raises(ConfigError) as fault:
        OFTConfig(**options)
    assert all(w in str(fault.value) for w in words)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Embedding(5, 8), "word embeddings"),
        (nn.ConvTranspose2d(4, 4, 3), "transposed convolutions"),
        (nn.LayerNorm(8), "only linear layers"),
    ],
)
def test_layers_that_cannot_be_rotated_are_refused_by_name(module, words):
    with pytest.raises(ConfigError, match=words) as fault:
        OFTConfig(oft_block_size=4, target_modules=["x"]).select(nn.ModuleDict({"x": module}))
    assert fault.value.module == "x"


def test_projections_that_are_never_called_are_refused():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ConfigError, match="MultiheadAttention"):
        OFTConfig(oft_block_size=4, target_modules="all-linear").select(model)


def test_nothing_found_names_what_there_is():
    with pytest.raises(ConfigError, match=r"to_q.*to_k"):
        OFTConfig(target_modules=["nothing"]).select(Block())


def named(*names: str) -> nn.Module:
    """Linear layers under these names; those that end in "conv" are convolutions."""
    model = nn.Module()
    for name in names:
        at = model
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(leaf, nn.Conv2d(8, 8, 3) if leaf == "conv" else nn.Linear(8, 8))
    return model


UNMATCHED = [
    ({"exclude_modules": ["to_k", "to_x"]}, ["'exclude_modules': 'to_x'"]),
    ({"exclude_modules": ["ff"]}, ["'exclude_modules': 'ff'"]),  # there is such a layer, but nobody asked to train it
    ({"exclude_modules": r".*nothing"}, ["'exclude_modules': '.*nothing'"]),
    ({"conv_modules": ["ff", "conv"]}, ["'conv_modules': 'ff'"]),
    ({"conv_modules": r"convs\..*"}, ["'conv_modules': 'convs\\..*'"]),
    ({"rank_pattern": {"to_q": 2, "to_vv": 4}}, ["'rank_pattern': 'to_vv'"]),
    ({"target_modules": ["to_q", "to_kk"]}, ["'target_modules': 'to_kk'"]),
    ({"target_modules": ["to_q"], "layers_to_transform": [0, 7], "layers_pattern": ["blocks", "stacks"]},
     ["'layers_to_transform': '7'", "'layers_pattern': 'stacks'"]),
    ({"exclude_modules": ["to_k"], "conv_modules": "all-conv", "rank_pattern": {"to_q": 2}}, []),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), UNMATCHED, ids=str)
def test_a_choice_that_matches_no_layer_is_said(options, expected):
    model = named("blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q", "ff", "conv")
    selection = OFTConfig(**{"oft_block_size": 4, "target_modules": ["to_q", "to_k"], **options}).select(model)
    said = [line for line in selection.report().splitlines() if "matched no layer" in line]
    assert said == [f"Option {e} matched no layer, so it has no effect." for e in expected]
    # What another part of the same training has found is not said again.
    assert "matched no layer" not in selection.report(found=set(selection.patterns))


def test_presets_leave_layers_out_too():
    names = ("blocks.0.attn2.to_k", "blocks.0.attn2.to_q", "blocks.0.attn1.to_k")
    config = OFTConfig(oft_block_size=4, target_modules="attention", exclude_modules="text-attention")
    selection = config.select(named(*names))
    assert [c.name for c in selection.layers] == [names[1], names[2]] and "no layer" not in selection.report()
    config = OFTConfig(oft_block_size=4, target_modules="attention", conv_modules="all-conv", exclude_modules="all-linear")
    assert [c.name for c in config.select(named(*names, "conv")).layers] == ["conv"]


def test_block_numbers_that_fit_nothing_are_named():
    model = named("joint_blocks.0.attn.qkv", "joint_blocks.1.attn.qkv", "final.qkv")
    given = {"oft_block_size": 4, "target_modules": ["qkv"]}
    # Counted as PEFT does: without layers_pattern something has to stand before the list's name.
    with pytest.raises(ConfigError) as fault:
        OFTConfig(**given, layers_to_transform=[0]).select(model)
    assert all(w in str(fault.value) for w in ("'layers_to_transform'", "'layers_pattern'", "joint_blocks")), fault.value
    with pytest.raises(ConfigError) as fault:
        OFTConfig(**given, layers_to_transform=[4], layers_pattern="joint_blocks").select(model)
    assert all(w in str(fault.value) for w in ("'layers_to_transform'", "[4]", "0, 1")), fault.value
    with pytest.raises(ConfigError, match="'layers_pattern'.*input_blocks"):
        OFTConfig(**given, layers_to_transform=[0], layers_pattern=["input_blocks"]).select(model)
    with pytest.raises(ConfigError, match="matches 'target_modules'"):
        OFTConfig(oft_block_size=4, target_modules=["to_q"], layers_to_transform=[0]).select(model)
    right = OFTConfig(**given, layers_to_transform=[1], layers_pattern=["input_blocks", "joint_blocks"]).select(model)
    assert [c.name for c in right.layers] == ["joint_blocks.1.attn.qkv"]


def test_rank_pattern_and_remarks():
    model = Block()
    config = OFTConfig(oft_block_size=4, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 8.0})
    selection = config.select(model)
    assert {c.name: (c.block, c.count) for c in selection.layers} == {"to_q": (4, 3), "to_k": (6, 2)}
    assert not selection.adjusted() and "alpha_pattern has no effect" in selection.report()


def test_fan_in_fan_out_of_ordinary_layers_is_explained_and_has_no_effect():
    """PEFT corrects the setting for nn.Linear too; the exported rotation must be the trained one."""
    _, x, bank = make(fan_in_fan_out=True)
    model, _, plain = make()
    assert all(torch.equal(a, b) for a, b in zip(bank.state_dict().values(), plain.state_dict().values(), strict=True))
    with plain.installed(), plain.evaluation():
        trained = model(x)
    torch.testing.assert_close(merged(model, bank)(x), trained, rtol=1e-5, atol=1e-5)
    assert "fan_in_fan_out has no effect" in OFTConfig(oft_block_size=4, fan_in_fan_out=True, **TARGETS).select(model).report()


def model_of(names, width=8):
    """A model with linear layers of these names; "name:12" is one that reads 12 numbers."""
    model = nn.Module()
    for name in names:
        name, _, wide = name.partition(":")
        where = model
        for part in name.split(".")[:-1]:
            if part not in dict(where.named_children()):
                where.add_module(part, nn.Module())
            where = where.get_submodule(part)
        where.add_module(name.split(".")[-1], nn.Linear(int(wide or width), width))
    return model


NEITHER = ("time_embed.0", "out.2", "blocks.0.norm1", "x.proj_in", "final_layer.linear", "time_in.mlp.0", "double_blocks.0.img_mod.lin")


@pytest.mark.parametrize(
    ("attention", "forward"),
    [
        (["input_blocks.1.1.transformer_blocks.0.attn1.to_q", "middle_block.1.transformer_blocks.0.attn2.to_out.0"],
         ["middle_block.1.transformer_blocks.0.ff.net.0.proj", "middle_block.1.transformer_blocks.0.ff.net.2"]),
        (["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.proj", "single_blocks.2.linear1"],
         ["double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.2", "single_blocks.2.linear2"]),
        (["joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.context_block.attn.proj"],
         ["joint_blocks.0.x_block.mlp.fc1", "joint_blocks.0.context_block.mlp.fc2"]),
        # SD 3.5 medium's second attention
        (["joint_blocks.0.x_block.attn2.qkv", "joint_blocks.0.x_block.attn2.proj"], ["joint_blocks.0.x_block.mlp.fc1"]),
        (["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.out_proj"],
         ["text_model.encoder.layers.0.mlp.fc1"]),
        (["transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.to_add_out"],
         ["transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.0.txt_mlp.net.2"]),
        (["layers.0.attention.qkv", "layers.0.attention.out"], ["layers.0.feed_forward.w1", "layers.0.feed_forward.w3"]),
        (["blocks.0.self_attn.q", "blocks.0.cross_attn.o"], ["blocks.0.ffn.0", "blocks.0.ffn.2"]),
        (["double_layers.0.attn.w1q", "double_layers.0.attn.w2o"], ["double_layers.0.mlpC.c_fc1", "double_layers.0.mlpX.c_proj"]),
        (["blocks.0.attn1.Wqkv", "blocks.0.attn2.kv_proj"], ["blocks.0.mlp.fc1"]),
        (["visual_transformer_blocks.0.self_attention.to_query"], ["visual_transformer_blocks.0.feed_forward.in_layer"]),
        (["blocks.0.self_attn.output_proj", "blocks.0.cross_attn.q_proj"], ["blocks.0.mlp.layer1"]),
    ],
)  # fmt: skip
def test_presets_find_the_layers_of_all_families(attention, forward):
    others = [*NEITHER, "blocks.0.adaln_modulation_self_attn.1", "layers.0.attention.q_norm", "layers.0.adaLN_modulation.1"]
    model = model_of([*attention, *forward, *others])
    for preset, wanted in (("attention", {*attention}), ("attention+ff", {*attention, *forward})):
        selection = OFTConfig(oft_block_size=4, target_modules=preset).select(model)
        assert {c.name for c in selection.layers} == wanted


@pytest.mark.parametrize(
    ("text", "picture"),
    [
        (["b.attn2.to_k", "b.attn2.to_v"], ["b.attn1.to_k", "b.attn2.to_q", "b.attn2.to_out.0"]),
        (["double_blocks.0.txt_attn.qkv", "double_blocks.0.txt_attn.proj"], ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"]),
        (["joint_blocks.0.context_block.attn.qkv"], ["joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.attn2.qkv"]),
        (["transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.to_add_out"], ["transformer_blocks.0.attn.to_k"]),
        (["blocks.0.cross_attn.k", "blocks.0.cross_attn.v_img"], ["blocks.0.cross_attn.q", "blocks.0.self_attn.k"]),
        (["b.0.attn2.kv_proj"], ["b.0.attn2.q_proj", "b.0.attn1.Wqkv"]),
        (["blocks.0.attn.qkv_y", "blocks.0.attn.proj_y"], ["blocks.0.attn.qkv_x"]),
        (["double_layers.0.attn.w1q", "double_layers.0.attn.w1o"], ["double_layers.0.attn.w2q", "single_layers.0.attn.w1q"]),
        (["blocks.0.attn1.to_q_t", "blocks.0.attn1.to_out_t"], ["blocks.0.attn1.to_q", "blocks.0.attn1.to_out"]),
    ],
    ids=["cross-attention", "flux", "sd3", "diffusers", "wan", "hunyuan-dit", "mochi", "auraflow", "hidream"],
)
def test_text_attention_is_what_the_text_passes(text, picture):
    """The layers on real models: `text_attention_is_where_the_text_goes` in the host's checks."""
    model = model_of(text + picture)
    selection = OFTConfig(oft_block_size=4, target_modules="text-attention").select(model)
    assert {c.name for c in selection.layers} == set(text) and not selection.note


def test_attention_to_something_of_another_width_is_attention_to_the_text():
    text, picture = ["b.1.attn.to_k.0:6", "b.1.attn.to_v.0:6"], ["b.1.attn.to_q.0:8", "b.0.attn.to_q.0:8", "b.0.attn.to_k.0:8"]
    selection = OFTConfig(oft_block_size=2, target_modules="text-attention").select(model_of(text + picture))
    assert {c.name for c in selection.layers} == {n.partition(":")[0] for n in text}


def test_a_model_without_layers_for_the_text_is_trained_in_all_of_its_attention_and_that_is_said():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)}), "mlp": nn.Linear(8, 8)})
    config = OFTConfig(oft_block_size=4, target_modules="text-attention")
    selection = config.select(model)
    assert {c.name for c in selection.layers} == {"attn.qkv", "attn.proj"}
    assert selection.config is config and "no layers for 'text-attention'" in selection.report()
    with pytest.raises(ConfigError, match="No layer"):
        config.select(nn.ModuleDict({"mlp": nn.Linear(8, 8)}))


def test_state_of_another_selection_is_refused():
    _, _, bank = make()
    _, _, other = make(oft_block_size=2)
    with pytest.raises(ConfigError, match="another selection"):
        other.load_state_dict(bank.state_dict())
    _, _, same = make(seed=4)
    same.load_state_dict(bank.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), bank.state_dict().values(), strict=True))
