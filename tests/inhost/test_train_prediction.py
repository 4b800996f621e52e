"""What a model predicts is read off the host's own way of sampling."""

from __future__ import annotations

import comfy.model_sampling as sampling
import pytest
import torch
from comfyui_oft.nodes.training.prediction import foreseen
from comfyui_oft.oft_core.training import Objective

DISCRETE, EDM, FLOW = (
    sampling.ModelSamplingDiscrete,
    sampling.ModelSamplingContinuousEDM,
    sampling.ModelSamplingDiscreteFlow,
)
KINDS = {
    "eps": (DISCRETE, sampling.EPS, "eps"),
    "v": (DISCRETE, sampling.V_PREDICTION, "v"),
    "CosXL": (EDM, sampling.V_PREDICTION, "v"),
    "Cosmos 1, Playground 2.5": (EDM, sampling.EDM, "v"),
    "SD3": (FLOW, sampling.CONST, "flow"),
    "Flux": (sampling.ModelSamplingFlux, sampling.CONST, "flow"),
    "Cosmos 2": (sampling.ModelSamplingCosmosRFlow, sampling.COSMOS_RFLOW, "flow"),
    "Cascade": (sampling.StableCascadeSampling, sampling.EPS, "eps"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_has_no_error(kind):
    """A network's output that the host turns into the clean latents is no error, and one that is off by d is off by d."""
    schedule, parameterisation, prediction = KINDS[kind]
    model = type("ModelSampling", (schedule, parameterisation), {})()
    if schedule is EDM:
        model.set_parameters(0.002, 80.0, 0.5)
    found = foreseen(model)
    assert found.prediction == prediction
    assert found.continuous == (schedule is EDM)
    options = {"shift": found.shift}
    if prediction != "flow":
        options = {"alphas_cumprod": found.alphas_cumprod, "data_std": found.data_std}
    objective = Objective(prediction=prediction, sampling="logit_normal", **options)
    clean = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noised = objective.noised(clean, 1, 2, range(6))
    sigma = found.sigma_of(noised.sigma)
    x = model.noise_scaling(sigma, noised.noise.clone(), noised.x0).double()

    def error(output):
        denoised = model.calculate_denoised(sigma.double(), output, x)
        return objective.from_denoised(denoised.float(), noised) - objective.target(noised)

    # Every way of sampling is a straight line from output to picture: the output of the clean picture is on it.
    at_zero = model.calculate_denoised(sigma.double(), torch.zeros_like(x), x)
    slope = model.calculate_denoised(sigma.double(), torch.ones_like(x), x) - at_zero
    perfect = (clean.double() - at_zero) / slope
    assert error(perfect).abs().max() < 2e-2
    off = torch.full_like(x, 0.5)
    assert torch.allclose(error(perfect + off).abs().double(), off, atol=5e-2)
    assert sigma.max() <= float(model.sigma_max) * 1.01 or kind == "Cosmos 2"
