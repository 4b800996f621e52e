"""The autoencoder in TAESD layout: 64 x 64 px RGB <-> 16 channels of 8 x 8, as ComfyUI's ``taesd`` classes name it.

The network is narrower than the stock one where pictures are large (full resolution: 32 of 64 channels). Zero
channels make up the rest when the stock file is written: they stay zero through every ReLU, so nothing changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STOCK = 64  # channels of the stock layout at every resolution
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


def encoder(top: int = 32, width: int = STOCK) -> nn.Sequential:
    """RGB in 0..1 [B, 3, H, W] -> latents [B, 16, H/8, W/8]. `top`: channels at full resolution."""
    return nn.Sequential(
        conv(3, top), Block(top),
        conv(top, width, stride=2, bias=False), Block(width), Block(width), Block(width),
        conv(width, width, stride=2, bias=False), Block(width), Block(width), Block(width),
        conv(width, width, stride=2, bias=False), Block(width), Block(width), Block(width),
        conv(width, LATENT),
    )  # fmt: skip


def decoder(top: int = 32, width: int = STOCK) -> nn.Sequential:
    """Latents [B, 16, H/8, W/8] -> RGB about 0..1 [B, 3, H, W]."""
    def up() -> nn.Upsample:
        return nn.Upsample(scale_factor=2)

    return nn.Sequential(
        Clamp(), conv(LATENT, width), nn.ReLU(),
        Block(width), Block(width), Block(width), up(), conv(width, width, bias=False),
        Block(width), Block(width), Block(width), up(), conv(width, width, bias=False),
        Block(width), Block(width), Block(width), up(), conv(width, top, bias=False),
        Block(top), conv(top, 3),
    )  # fmt: skip


def stock_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shipped tensors padded with zeros to the stock layout, with the latent scale that undoes SD3's."""
    out = {}
    for key, value in weights.items():
        shape = list(value.shape)
        layer = key.rsplit(".", 1)[0]
        ends = {"taesd_encoder.0": (STOCK, 3), "taesd_encoder.14": (LATENT, STOCK),
                "taesd_decoder.1": (STOCK, LATENT), "taesd_decoder.19": (3, STOCK)}  # fmt: skip
        full = ends.get(layer, (STOCK, STOCK))
        shape[: 2 if value.ndim == 4 else 1] = full[: 2 if value.ndim == 4 else 1]
        padded = torch.zeros(shape, dtype=value.dtype)
        padded[tuple(slice(0, n) for n in value.shape)] = value
        out[key] = padded
    out["vae_scale"] = torch.tensor(SCALE)
    out["vae_shift"] = torch.tensor(SHIFT)
    return out
