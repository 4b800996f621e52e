"""PEFT itself as the judge of training: 50 AdamW steps on a small diffusers UNet, the same start, data and noise on both sides.

Both sides see the same model weights, initial rotations, pictures, conditions, timesteps and noise. The losses of all steps and the
gradients of every layer at several steps must agree to 1e-4 relative. The last test proves that this comparison can fail.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field

import pytest
import torch

from oft_core.training import OFTConfig, RotationBank

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

STEPS = 50
LIMIT = 1e-4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24, attention_head_dim=8, norm_num_groups=4,
        ).eval()


def data(step: int):
    """Noised latents, timesteps, conditions and noise of a step, the same on both sides."""
    g = torch.Generator().manual_seed(1000 + step)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    condition = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(2, 4, 8, 8, generator=g)
    t = torch.randint(0, 1000, (2,), generator=g)
    alpha = torch.cos(t.double() / 1000 * 1.5).square().float().view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, condition, noise


def loss_of(model, step: int) -> torch.Tensor:
    x, t, condition, noise = data(step)
    return torch.nn.functional.mse_loss(model(x, t, condition).sample, noise)


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    #: step -> module -> gradient of its packed parameters
    grads: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    final: dict[str, torch.Tensor] = field(default_factory=dict)


WATCHED = (0, 1, 7, 20, STEPS - 1)


def start_values(module: str, shape, scale: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(map(ord, module)))
    return torch.randn(shape, generator=g) * scale


def run_peft(unet, options: dict, lr: float, scale: float, steps: int = STEPS) -> Run:
    model = copy.deepcopy(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.OFTConfig(target_modules=TARGETS, **options))
    parameters = {
        n.removeprefix("base_model.model.").removesuffix(".oft_R.default.weight"): p
        for n, p in model.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for n, p in parameters.items():
            p.copy_(start_values(n, p.shape, scale))
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=1e-2)
    run = Run()
    for step in range(steps):
        loss = loss_of(model, step)
        loss.backward()
        run.losses.append(loss.item())
        if step in WATCHED:
            run.grads[step] = {n: p.grad.clone() for n, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    run.final = {n: p.detach().clone() for n, p in parameters.items()}
    return run


def run_ours(unet, options: dict, lr: float, scale: float, flip: bool, steps: int = STEPS) -> Run:
    """``flip``: PEFT's exact branch builds the transposed rotation, so its parameters are the negatives of ours."""
    sign = -1.0 if flip else 1.0
    model = copy.deepcopy(unet)
    config = OFTConfig(target_modules=TARGETS, scaled=False, angle_cap=None, **options)
    bank = RotationBank({"unet": (model, config.select(model))})

    def by_module(tensors) -> dict[str, torch.Tensor]:
        out = {}
        for name, members in bank._members.items():
            for c, (at, n) in zip(members, bank._built[name].cuts, strict=True):
                out[c.name] = sign * tensors[name][at : at + n].clone()
        return out

    with torch.no_grad():
        for n, view in {
            c.name: bank.parameters[name].data[at : at + n]
            for name, members in bank._members.items()
            for c, (at, n) in zip(members, bank._built[name].cuts, strict=True)
        }.items():
            view.copy_(sign * start_values(n, view.shape, scale))
    optimizer = torch.optim.AdamW(bank.parameters.values(), lr=lr, weight_decay=1e-2)
    run = Run()
    with bank.installed():
        for step in range(steps):
            bank.begin_step(step)
            loss = loss_of(model, step)
            loss.backward()
            bank.finish_backward()
            run.losses.append(loss.item())
            if step in WATCHED:
                run.grads[step] = by_module({n: p.grad for n, p in bank.parameters.items()})
            optimizer.step()
            optimizer.zero_grad()
        run.final = by_module({n: p.detach() for n, p in bank.parameters.items()})
    return run


def difference(ours: Run, theirs: Run) -> dict[str, float]:
    """Largest relative difference of losses, gradients (per layer) and final parameters."""
    assert ours.final.keys() == theirs.final.keys() and len(ours.final) >= 24
    losses = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    grads = max(
        float((ours.grads[s][n] - g).norm() / g.norm()) for s, layers in theirs.grads.items() for n, g in layers.items()
    )
    final = max(float((ours.final[n] - p).norm() / p.norm()) for n, p in theirs.final.items())
    return {"losses": losses, "grads": grads, "final": final}


CASES = {
    "neumann": ({"use_cayley_neumann": True}, 2e-3, 0.05),
    "exact": ({"use_cayley_neumann": False}, 2e-3, 0.05),
    "neumann coft": ({"use_cayley_neumann": True, "coft": True, "eps": 0.2}, 2e-3, 0.05),
    "exact coft": ({"use_cayley_neumann": False, "coft": True, "eps": 0.2}, 2e-3, 0.05),
    "neumann shared": ({"use_cayley_neumann": True, "block_share": True}, 2e-3, 0.05),
    "exact shared coft": ({"use_cayley_neumann": False, "block_share": True, "coft": True, "eps": 0.2}, 2e-3, 0.05),
    "neumann 4 terms, r": ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 4, "r": 2, "oft_block_size": 0}, 2e-3, 0.05),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_follow_peft(unet, case):
    options, lr, scale = CASES[case]
    options = {"oft_block_size": 8, **options}
    theirs = run_peft(unet, options, lr, scale)
    ours = run_ours(unet, options, lr, scale, flip=not options["use_cayley_neumann"])
    found = difference(ours, theirs)
    assert found["losses"] < LIMIT and found["grads"] < LIMIT and found["final"] < LIMIT, found
    moved = max(float((theirs.final[n] - start_values(n, p.shape, scale)).abs().max()) for n, p in theirs.final.items())
    assert moved > 0.02
    if options.get("coft"):
        # The limit must have been at work, or the case would prove nothing about it.
        free = run_peft(unet, {**options, "coft": False}, lr, scale, steps=3)
        assert max(abs(a - b) / b for a, b in zip(free.losses, theirs.losses[:3], strict=True)) > 10 * LIMIT


@pytest.mark.parametrize(
    "wrong", [{"eps": 0.21}, {"block_share": True}, {"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 6}, {"lr": 2.1e-3}], ids=str
)
def test_the_comparison_fails_for_anything_else(unet, wrong):
    """A slightly different radius, sharing, parametrisation, series or learning rate is far beyond the limit within 8 steps."""
    options = {"oft_block_size": 8, "use_cayley_neumann": True, "coft": "eps" in wrong, "eps": 0.2 if "eps" in wrong else 6e-5}
    theirs = run_peft(unet, options, 2e-3, 0.05, steps=8)
    lr = wrong.get("lr", 2e-3)
    ours = run_ours(unet, {**options, **{k: v for k, v in wrong.items() if k != "lr"}}, lr, 0.05, flip=False, steps=8)
    if "block_share" in wrong:
        assert max(abs(a - b) / b for a, b in zip(ours.losses, theirs.losses, strict=True)) > 10 * LIMIT
    else:
        assert max(difference(ours, theirs).values()) > 10 * LIMIT
