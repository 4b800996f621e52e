"""The autoencoder in TAESD layout: 64 x 64 px RGB <-> 16 channels of 8 x 8, as ComfyUI's ``taesd`` classes name it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64  # channels at every resolution
LATENT = 16
# SD3's latent format in ComfyUI; written into the file, so that the model's latents are the encoder's own output.
SCALE, SHIFT = 1.5305, 0.0609


def conv(channels_in: int, channels_out: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **options)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Residual block of three convolutions; the last starts at zero, so that a block starts as identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(channels, channels), nn.ReLU(), conv(channels, channels), nn.ReLU(), conv(channels, channels)
        )
        nn.init.zeros_(self.conv[4].weight)
        nn.init.zeros_(self.conv[4].bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def blocks() -> list[nn.Module]:
    return [Block(WIDTH), Block(WIDTH), Block(WIDTH)]


def encoder() -> nn.Sequential:
    """RGB in 0..1 [B, 3, H, W] -> latents [B, 16, H/8, W/8]."""
    def halve() -> nn.Conv2d:
        return conv(WIDTH, WIDTH, stride=2, bias=False)

    return nn.Sequential(
        conv(3, WIDTH), Block(WIDTH), halve(), *blocks(), halve(), *blocks(), halve(), *blocks(), conv(WIDTH, LATENT)
    )


def decoder() -> nn.Sequential:
    """Latents [B, 16, H/8, W/8] -> RGB about 0..1 [B, 3, H, W]."""
    def double() -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]

    return nn.Sequential(
        Clamp(), conv(LATENT, WIDTH), nn.ReLU(),
        *blocks(), *double(), *blocks(), *double(), *blocks(), *double(),
        Block(WIDTH), conv(WIDTH, 3),
    )  # fmt: skip


def stock_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the latent scale that undoes SD3's, as ComfyUI reads it from the file."""
    return {**weights, "vae_scale": torch.tensor(SCALE), "vae_shift": torch.tensor(SHIFT)}
