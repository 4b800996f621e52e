"""Euler's method for models with discrete noise levels: sample pictures where a host has no sampler that training could call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .seeds import generator


def sample(
    predict: Callable[[Tensor, Tensor, str], Tensor],
    alphas_cumprod: Tensor,
    prediction: str,
    shape: tuple[int, ...],
    *,
    text: str,
    negative: str = "",
    steps: int = 20,
    cfg: float = 5.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    each: Callable[[], object] = lambda: None,
) -> Tensor:
    """A latent (1, channels, h, w), float32, drawn from noise (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without its noise).

    predict: (x_t of variance 1, timesteps (1,) whole numbers, text) -> eps or v, as ``prediction`` says.   alphas_cumprod: (steps,).
    The levels are evenly spaced timesteps, the last one first.   each: is called before every step, may raise to stop.
    """
    a = alphas_cumprod.double()
    sigmas = ((1 - a) / a).sqrt()
    timesteps = torch.linspace(len(a) - 1, 0, steps).round().long()
    levels = torch.cat([sigmas[timesteps], torch.zeros(1, dtype=torch.float64)])
    x = torch.randn(shape, generator=generator(seed, "sample")).to(device) * float((1 + levels[0] ** 2).sqrt())
    for step, sigma, after in zip(timesteps, levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        each()
        level = step.reshape(1).to(device)
        scaled = x / (1 + sigma**2) ** 0.5
        given = predict(scaled, level, text).float()
        if cfg != 1:
            other = predict(scaled, level, negative).float()
            given = other + cfg * (given - other)
        if prediction == "v":
            # Noise and picture of a velocity: x_t = signal x0 + spread n, v = signal n - spread x0.
            signal, spread = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
            given = signal * given + spread * scaled
        x = x + (after - sigma) * given
    return x
