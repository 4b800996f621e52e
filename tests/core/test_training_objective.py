"""Noise, targets and weights against their formulas; random numbers that depend on nothing but (seed, step, slot)."""

from __future__ import annotations

import math

import pytest
import torch

from oft_core.training import ConfigError, Noised, Objective
from oft_core.training.objective import (
    min_snr_weight,
    per_sample_error,
    resolution_shift,
    scaled_linear_alphas,
    shifted,
)

X0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_sd_schedule_has_the_known_ends():
    """sqrt((1-a)/a) of SD1.5 runs from 0.0292 to 14.6146 (k-diffusion's sigma_min and sigma_max)."""
    a = scaled_linear_alphas()
    sigma = ((1 - a) / a).sqrt()
    assert len(a) == 1000 and abs(sigma[0] - 0.0292) < 1e-4 and abs(sigma[-1] - 14.6146) < 1e-3


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_forward_process_target_and_conversion_agree(prediction):
    objective = Objective(prediction=prediction)
    n = objective.noised(X0, 1, 2, range(4))
    s, d = n.signal.view(-1, 1, 1, 1), n.spread.view(-1, 1, 1, 1)
    torch.testing.assert_close(n.x_t, s * X0 + d * n.noise)
    target = objective.target(n)
    if prediction == "eps":
        expected, back = n.noise, (n.x_t - d * target) / s
    elif prediction == "v":
        expected, back = s * n.noise - d * X0, s * n.x_t - d * target
    else:
        expected, back = n.noise - X0, n.x_t - n.sigma.view(-1, 1, 1, 1) * target
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(back, X0, rtol=1e-3, atol=1e-3)
    # A perfect prediction of x0 is a perfect prediction of the target, and an error is the same error.
    torch.testing.assert_close(objective.from_denoised(X0, n), target, rtol=1e-3, atol=1e-3)
    if prediction == "flow":
        torch.testing.assert_close(n.signal + n.spread, torch.ones(4))
        torch.testing.assert_close(n.timestep, n.sigma * 1000)
    else:
        torch.testing.assert_close(n.signal.square() + n.spread.square(), torch.ones(4))
        torch.testing.assert_close(n.x_t / s, X0 + n.sigma.view(-1, 1, 1, 1) * n.noise, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(n.signal.square().double(), objective.alphas_cumprod[n.timestep], rtol=1e-5, atol=1e-6)


def test_edm_is_v_of_latents_in_units_of_their_deviation():
    """Against the preconditioning of Karras et al. (2022), table 1: F = (x0 - c_skip (x0 + sigma n)) / c_out; F is -v."""
    std = 0.5
    sigmas = torch.linspace(math.log(0.002), math.log(80), 1000, dtype=torch.float64).exp()
    objective = Objective(prediction="v", alphas_cumprod=1 / ((sigmas / std) ** 2 + 1), data_std=std)
    n = objective.noised(X0, 1, 2, range(4))
    torch.testing.assert_close(n.sigma.double(), sigmas[n.timestep], rtol=1e-4, atol=1e-7)
    sigma, x0, noise = n.sigma.view(-1, 1, 1, 1).double(), X0.double(), n.noise.double()
    skip, out = std**2 / (sigma**2 + std**2), sigma * std / (sigma**2 + std**2).sqrt()
    network = (x0 - skip * (x0 + sigma * noise)) / out
    torch.testing.assert_close(-objective.target(n).double(), network, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(objective.from_denoised(X0, n), objective.target(n), rtol=1e-3, atol=1e-3)
    # An error of the network is the same error here, at every noise level.
    off = torch.full_like(x0, 0.1)
    denoised = skip * (x0 + sigma * noise) + out * (network + off)
    error = objective.from_denoised(denoised.float(), n) - objective.target(n)
    torch.testing.assert_close(-error.double(), off, rtol=2e-2, atol=2e-2)
    with pytest.raises(ConfigError, match="data_std"):
        Objective(prediction="flow", data_std=0.5)


def test_states_of_versions_without_data_std_go_on():
    assert "data_std" not in Objective().fingerprint()
    assert Objective(prediction="v", data_std=0.5).fingerprint()["data_std"] == 0.5


def test_random_numbers_depend_on_seed_step_and_slot_only():
    objective = Objective(caption_dropout=0.5)
    whole = objective.noised(X0, 5, 9, range(4))
    torch.rand(3)
    for i in range(4):
        one = objective.noised(X0[i : i + 1], 5, 9, [i])
        assert torch.equal(one.noise[0], whole.noise[i]) and one.timestep == whole.timestep[i] and one.drop[0] == whole.drop[i]
    for other in (objective.noised(X0, 6, 9, range(4)), objective.noised(X0, 5, 10, range(4)), objective.noised(X0, 5, 9, range(4, 8))):
        assert not torch.equal(other.noise, whole.noise) and not torch.equal(other.timestep, whole.timestep)
    assert not torch.equal(whole.noise[0], whole.noise[1])
    # Another setting leaves the other draws alone.
    assert torch.equal(Objective(prediction="v", sampling="logit_normal").noised(X0, 5, 9, range(4)).noise, whole.noise)
    before = torch.random.get_rng_state()
    objective.noised(X0, 5, 9, range(4))
    assert torch.equal(before, torch.random.get_rng_state())


def many(objective: Objective, count: int = 4000) -> Noised:
    return objective.noised(torch.zeros(count, 2, 2, 2), 3, 0, range(count))


def test_uniform_timesteps_cover_the_range_evenly():
    t = many(Objective()).timestep
    counts = torch.histc(t.float(), 10, 0, 1000)
    assert t.min() < 10 and t.max() > 990 and counts.min() > 320 and counts.max() < 480
    part = many(Objective(low=0.2, high=0.5)).timestep
    assert part.min() >= 200 and part.max() < 500 and part.float().std() > 80


def test_logit_normal_and_shift():
    n = many(Objective(prediction="flow", sampling="logit_normal", logit_mean=0.3, logit_std=0.8))
    logits = torch.logit(n.sigma.double())
    assert abs(logits.mean() - 0.3) < 0.05 and abs(logits.std() - 0.8) < 0.04
    moved = many(Objective(prediction="flow", sampling="logit_normal", logit_mean=0.3, logit_std=0.8, shift=3.0))
    torch.testing.assert_close(moved.sigma, 3 * n.sigma / (1 + 2 * n.sigma))
    assert shifted(torch.tensor(0.5), 3.0) == 0.75
    # The shift by a adds log(a) to the logit, so Flux's rule is its mu.
    assert abs(math.log(resolution_shift(32, 32)) - 0.5) < 1e-9 and abs(math.log(resolution_shift(128, 128)) - 1.15) < 1e-9
    auto = Objective(prediction="flow", shift="resolution").noised(torch.zeros(2, 1, 128, 128), 0, 0, range(2))
    plain = Objective(prediction="flow").noised(torch.zeros(2, 1, 128, 128), 0, 0, range(2))
    torch.testing.assert_close(torch.logit(auto.sigma), torch.logit(plain.sigma) + 1.15, rtol=1e-4, atol=1e-4)


def test_noise_offset_and_caption_dropout():
    plain, offset = many(Objective(), 500), many(Objective(noise_offset=0.5), 500)
    difference = offset.noise - plain.noise
    constant = difference[..., :1, :1]
    torch.testing.assert_close(difference, constant.expand_as(difference))
    assert abs(constant.std() - 0.5) < 0.05 and torch.equal(offset.timestep, plain.timestep)
    assert sum(plain.drop) == 0 and sum(many(Objective(caption_dropout=1.0), 20).drop) == 20
    assert 0.17 < sum(many(Objective(caption_dropout=0.2), 2000).drop) / 2000 < 0.23


def test_min_snr_weights():
    snr = torch.tensor([0.01, 1.0, 5.0, 100.0])
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "eps"), torch.tensor([1.0, 1.0, 1.0, 0.05]))
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "v"), torch.tensor([0.01 / 1.01, 0.5, 5 / 6, 5 / 101]))
    assert min_snr_weight(torch.zeros(1), 5.0, "eps") == 1 and min_snr_weight(torch.zeros(1), 5.0, "v") == 0
    for prediction in ("eps", "v"):
        objective = Objective(prediction=prediction, min_snr_gamma=5.0)
        n = many(objective, 50)
        a = objective.alphas_cumprod[n.timestep]
        torch.testing.assert_close(objective.weight(n).double(), min_snr_weight(a / (1 - a), 5.0, prediction), rtol=1e-3, atol=1e-4)
    assert torch.equal(Objective().weight(many(Objective(), 5)), torch.ones(5))


def test_masked_error_is_the_mean_of_what_the_mask_lets_through():
    p, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2] = 1
    mask[1] = 0.5
    found = per_sample_error(p, t, mask)
    torch.testing.assert_close(found[0], (p - t)[0, :, :2].square().mean())
    torch.testing.assert_close(found[1], (p - t)[1].square().mean())
    torch.testing.assert_close(per_sample_error(p, t), (p - t).square().mean((1, 2, 3)))
    assert per_sample_error(p, t, torch.zeros_like(mask)).tolist() == [0, 0]
    assert per_sample_error(p.bfloat16(), t).dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [{"prediction": "x0"}, {"sampling": "normal"}, {"shift": 3.0}, {"prediction": "flow", "min_snr_gamma": 5.0}, {"low": 0.5, "high": 0.5},
     {"prediction": "flow", "noise_offset": 0.1}, {"prediction": "flow", "shift": 0.0}, {"caption_dropout": 1.5}, {"prediction": "flow", "shift": "big"}],
    ids=str,
)  # fmt: skip
def test_wrong_objectives_are_refused_by_name(options):
    with pytest.raises(ConfigError, match=f"'({'|'.join(options)})'"):
        Objective(**options)


def test_fingerprint_tells_schedules_apart():
    a, b = Objective(), Objective(alphas_cumprod=scaled_linear_alphas(end=0.02))
    assert a.fingerprint() != b.fingerprint() and a.fingerprint() == Objective().fingerprint()
