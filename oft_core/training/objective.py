"""What is predicted, at which noise level, and how much each error counts. Pure functions, and one small class that holds the choices.

Forward process: x_t = signal * x0 + spread * noise. Discrete models (``eps``, ``v``): signal = sqrt(a), spread = sqrt(1 - a) for the
cumulative product a of a timestep. EDM models (Karras et al. 2022, arXiv 2206.00364) are ``v`` on latents divided by their ``data_std``:
their network's target is v up to its sign. Flow models: signal = 1 - s, spread = s for s in (0, 1]. Every random number depends only on
(seed, step, slot): slot is the position of an item in the whole batch of a step, accumulated parts included.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from .errors import ConfigError
from .seeds import generator

PREDICTIONS = ("eps", "v", "flow")
SAMPLINGS = ("uniform", "logit_normal")


def scaled_linear_alphas(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """Cumulative products of the noise schedule of Stable Diffusion 1, 2 and XL: (steps,) float64."""
    return torch.cumprod(1 - torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square(), 0)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels moved towards 1 by the timestep shift of SD3 (Esser et al. 2024, arXiv 2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def resolution_shift(height: int, width: int) -> float:
    """Flux's shift for latents of height x width: exp of a line through 0.5 at 256 and 1.15 at 4096 tokens of 2x2."""
    tokens = height * width / 4
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Min-SNR weights (Hang et al. 2023, arXiv 2303.09556): min(snr, gamma) / snr for eps, / (snr + 1) for v."""
    capped = snr.clamp_max(gamma)
    if prediction == "v":
        return capped / (snr + 1)
    return torch.where(snr > 0, capped / snr.clamp_min(torch.finfo(snr.dtype).tiny), torch.ones_like(snr))


def per_sample_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each item, float32 (batch,). mask (batch, 1, ...), 0..1: where the error counts.

    The mean runs over what the mask lets through, so the size of the masked part does not change the learning rate. An item whose
    mask is empty has error 0.
    """
    error = (prediction.float() - target.float()).square()
    if mask is None:
        return error.flatten(1).mean(1)
    weight = mask.to(error.device, torch.float32).expand_as(error).flatten(1)
    return (error.flatten(1) * weight).sum(1) / weight.sum(1).clamp_min(1e-6)


@dataclass
class Noised:
    """A batch as the model gets it. Everything (batch, ...) or (batch,), on the latents' device, float32.

    x0: latents.  noise.  x_t: noised latents.  signal, spread: see the module's text.  sigma: data_std * spread / signal for eps and v
    (so that data_std * x_t / signal = x0 + sigma * noise), s for flow.  timestep: 0..999 as the model counts.  drop: items that get the empty caption.
    """

    x0: Tensor
    noise: Tensor
    x_t: Tensor
    signal: Tensor
    spread: Tensor
    sigma: Tensor
    timestep: Tensor
    drop: list[bool]


@dataclass(frozen=True)
class Objective:
    """The choices. ``prediction``: eps, v or flow, as the model was trained.

    alphas_cumprod: (steps,) for eps and v; SD's schedule if None.   data_std: of the latents, as EDM models count it; 1 for others.   sampling: of noise levels: ``uniform`` or ``logit_normal``
    (with ``logit_mean`` and ``logit_std``).   shift: of flow levels; a number, or ``resolution`` for Flux's rule.
    low, high: part of the noise levels that is trained, 0..1.   min_snr_gamma: 0 for none, eps and v only; 5 is usual.
    noise_offset: strength of a constant added to every channel's noise, eps and v only.   caption_dropout: share of items that get
    the empty caption.
    """

    prediction: str = "eps"
    alphas_cumprod: Tensor | None = field(default=None, compare=False)
    data_std: float = 1.0
    sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float | str = 1.0
    low: float = 0.0
    high: float = 1.0
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        def need(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ConfigError(f"Option '{name}' has a value that cannot be used", found=repr(getattr(self, name)), expected=expected)

        need("prediction", self.prediction in PREDICTIONS, " or ".join(PREDICTIONS))
        need("sampling", self.sampling in SAMPLINGS, " or ".join(SAMPLINGS))
        flow = self.prediction == "flow"
        need("shift", self.shift == "resolution" or not isinstance(self.shift, str) and self.shift > 0, "a number above 0 or 'resolution'")
        need("shift", flow or self.shift == 1.0, "1, except for flow models")
        need("low", 0 <= self.low < self.high <= 1, "0 <= low < high <= 1")
        need("min_snr_gamma", self.min_snr_gamma >= 0 and not (flow and self.min_snr_gamma), "0 or more, and 0 for flow models")
        need("noise_offset", not (flow and self.noise_offset), "0 for flow models")
        need("data_std", self.data_std > 0 and (self.data_std == 1 or self.prediction == "v"), "more than 0, and 1 except for v models")
        need("caption_dropout", 0 <= self.caption_dropout <= 1, "0 to 1")
        need("logit_std", self.logit_std > 0, "more than 0")
        if not flow and self.alphas_cumprod is None:
            object.__setattr__(self, "alphas_cumprod", scaled_linear_alphas())

    def fingerprint(self) -> dict[str, object]:
        """Plain values that a resumed run must share."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "alphas_cumprod"}
        if self.data_std == 1:
            del out["data_std"]  # states of versions without it go on
        if self.alphas_cumprod is not None:
            raw = self.alphas_cumprod.detach().cpu().double().numpy().tobytes()
            out["alphas_cumprod"] = hashlib.sha256(raw).hexdigest()[:16]
        return out

    # ---------------------------------------------------------------- random draws

    def noised(self, x0: Tensor, seed: int, step: int, slots: Sequence[int]) -> Noised:
        """Noise latents x0 (batch, channels, ...) for the items at ``slots`` of ``step``. Draws on the CPU, computes in float32."""
        place, noise, drop = [], [], []
        for slot in slots:
            g = generator(seed, "noise", step, slot)
            # A fixed order and number of draws per item, so that a changed setting does not change the other random numbers.
            uniform, normal, dropped = torch.rand(1, generator=g), torch.randn(1, generator=g), torch.rand(1, generator=g)
            constant = torch.randn(x0.shape[1], *[1] * (x0.ndim - 2), generator=g)
            one = torch.randn(x0.shape[1:], generator=g)
            noise.append(one + self.noise_offset * constant if self.noise_offset else one)
            place.append(uniform if self.sampling == "uniform" else torch.sigmoid(self.logit_mean + self.logit_std * normal))
            drop.append(bool(dropped.item() < self.caption_dropout))
        level = self.low + (self.high - self.low) * torch.cat(place)
        signal, spread, sigma, timestep = (t.to(x0.device) for t in self.levels(level, x0.shape[-2:]))
        x0, eps = x0.float(), torch.stack(noise).to(x0.device)
        shape = (-1, *[1] * (x0.ndim - 1))
        x_t = signal.view(shape) * self._scaled(x0) + spread.view(shape) * eps
        return Noised(x0, eps, x_t, signal, spread, sigma, timestep, drop)

    def _scaled(self, latents: Tensor) -> Tensor:
        """In units of their standard deviation."""
        return latents if self.data_std == 1 else latents / self.data_std

    def levels(self, level: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noise level 0..1 (batch,) -> (signal, spread, sigma, timestep), float32; ``size``: the latents' last two dimensions."""
        if self.prediction == "flow":
            shift = resolution_shift(*size) if self.shift == "resolution" else self.shift
            # Level 0 has no noise to learn from; the draw can hit it exactly.
            sigma = shifted(level, shift).clamp(1e-5, 1)
            return 1 - sigma, sigma, sigma, sigma * 1000
        count = len(self.alphas_cumprod)
        index = (level * count).long().clamp_max(count - 1)
        a = self.alphas_cumprod.cpu().double()[index]
        signal, spread = a.sqrt().float(), (1 - a).sqrt().float()
        return signal, spread, self.data_std * (spread / signal.clamp_min(1e-8)), index

    # ---------------------------------------------------------------- target and weight

    def target(self, n: Noised) -> Tensor:
        """What the model should predict: noise (eps), signal*noise - spread*x0 (v), noise - x0 (flow)."""
        if self.prediction == "eps":
            return n.noise
        if self.prediction == "flow":
            return n.noise - n.x0
        shape = (-1, *[1] * (n.x0.ndim - 1))
        return n.signal.view(shape) * n.noise - n.spread.view(shape) * self._scaled(n.x0)

    def from_denoised(self, denoised: Tensor, n: Noised) -> Tensor:
        """A prediction of x0 (what ComfyUI's ``apply_model`` returns) as a prediction of ``target``."""
        shape = (-1, *[1] * (denoised.ndim - 1))
        signal, spread = n.signal.view(shape), n.spread.view(shape)
        clean = self._scaled(denoised.float())
        noise = (n.x_t - signal * clean) / spread.clamp_min(1e-8)
        if self.prediction == "eps":
            return noise
        if self.prediction == "flow":
            return noise - clean
        return signal * noise - spread * clean

    def weight(self, n: Noised) -> Tensor:
        """Weight of each item's error, float32 (batch,)."""
        if not self.min_snr_gamma:
            return torch.ones_like(n.signal)
        snr = n.signal.square() / n.spread.square().clamp_min(1e-12)
        return min_snr_weight(snr, self.min_snr_gamma, self.prediction)
