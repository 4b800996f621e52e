"""What a host's model predicts, found by trying its own way of sampling; and the models that cannot learn from pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...oft_core.training import ConfigError

# Models of the host that make something else than a picture from a text, and why training on pictures and captions
# is not what they need. Names are those of the host's list of supported models.
UNSUITED = {
    "SVD_img2vid": "it sets a given picture in motion and reads no captions",
    "SV3D_u": "it turns a given picture round and reads no captions",
    "SV3D_p": "it turns a given picture round and reads no captions",
    "Stable_Zero123": "it turns a given picture round and reads no captions",
    "SD_X4Upscaler": "it enlarges a given picture",
    "LotusD": "it reads a map off a given picture in one step",
    "HunyuanImage21Refiner": "it refines a given picture",
}


@dataclass(frozen=True)
class Foreseen:
    """A model's own prediction, in the words of `Objective`.

    prediction: eps, v or flow.   shift: of flow levels.   alphas_cumprod, data_std: of the others.   continuous: the
    levels are sigmas of EDM's kind, not 1000 steps of a diffusion.   exploding: a flow model whose host counts
    noise as x0 + sigma * noise, so that its sigma is s / (1 - s).
    """

    prediction: str
    shift: float = 1.0
    alphas_cumprod: torch.Tensor | None = None
    data_std: float = 1.0
    continuous: bool = False
    exploding: bool = False

    def sigma_of(self, sigma: torch.Tensor) -> torch.Tensor:
        """The objective's sigma (batch,) as the host counts it."""
        return sigma / (1 - sigma).clamp_min(1e-5) if self.exploding else sigma


def foreseen(sampling: Any) -> Foreseen:
    """The target whose prediction `sampling` (ComfyUI's model_sampling) turns into exactly the clean picture.

    Raises ConfigError for ways of sampling that are not known.
    """
    clean = torch.linspace(-1, 1, 12).reshape(1, 1, 3, 4)
    noise = torch.linspace(2, -3, 12).reshape(1, 1, 3, 4) ** 2 / 4
    level = 0.6
    try:
        std = float(getattr(sampling, "sigma_data", 1.0))
        signal = 1 / (1 + (level / std) ** 2) ** 0.5
        velocity = signal * noise - (level / std) * signal * clean / std
        sigma = torch.tensor([level])
        x = sampling.noise_scaling(sigma, noise.clone(), clean.clone())
        for kind, target in (
            ("eps", noise),
            ("v", velocity),
            # EDM's networks predict the same with the other sign.
            ("v", -velocity),
            ("flow", noise - clean),
        ):
            if torch.allclose(sampling.calculate_denoised(sigma, target, x), clean, atol=1e-5):
                return _described(kind, sampling, std, exploding=torch.allclose(x, clean + level * noise))
    except (AttributeError, TypeError) as error:
        raise ConfigError("This model's way of sampling is not known", found=str(error)) from error
    raise ConfigError(
        "This kind of model cannot be trained here",
        found=type(sampling).__mro__[1].__name__,
        expected="a model that predicts noise, velocity or flow",
    )


def _described(kind: str, sampling: Any, std: float, exploding: bool) -> Foreseen:
    if kind == "flow" and exploding:
        return Foreseen("flow", exploding=True)
    if kind == "flow":
        half = float(sampling.percent_to_sigma(0.5))
        # Half way through a shifted flow schedule lies shift / (shift + 1).
        return Foreseen("flow", shift=half / (1 - half))
    std = std if kind == "v" else 1.0
    sigmas = sampling.sigmas.detach().double().cpu().clone() / std
    # Steps are counted in whole numbers where there are steps.
    continuous = kind == "v" and not hasattr(sampling, "num_timesteps")
    return Foreseen(kind, alphas_cumprod=1 / (sigmas**2 + 1), data_std=std, continuous=continuous)


def refuse_unsuited(base: Any) -> None:
    """Raises ConfigError for a model (ComfyUI's BaseModel) that cannot learn from pictures and captions."""
    config, form = base.model_config, base.latent_format
    kind = type(config).__name__
    reason = UNSUITED.get(kind)
    if "audio_model" in config.unet_config or "audio" in type(form).__name__.lower():
        reason = "it makes sound"
    elif getattr(form, "latent_dimensions", 2) == 1:
        reason = "it makes shapes, not pictures"
    if reason is not None:
        raise ConfigError(
            f"This model cannot be trained with pictures and captions: {reason}",
            found=kind,
            expected="a model that draws pictures or videos from a text",
        )
