"""A tiny diffusion model as web UIs have it: UNet, text encoder and VAE, with the methods that training calls."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import torch
from torch import nn

WIDTH, TEXT, POOLED = 32, 24, 12


class CrossAttention(nn.Module):
    def __init__(self, context: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(w, WIDTH, bias=False) for w in (WIDTH, context, context))
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        return self.to_out((q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ v)


class BasicTransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(WIDTH), CrossAttention(TEXT)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.checkpoint = True

    def forward(self, x, context):
        if self.checkpoint:
            raise AssertionError("the model's own checkpoints lose gradients")
        x += self.attn1(self.norm1(x))  # hosts' code works in place
        x += self.attn2(self.norm2(x), context)
        return x


class UNet(nn.Module):
    """in_channels: 4, or 9 as an inpainting model.   xl: whether it reads a vector of sizes and pooled text."""

    def __init__(self, in_channels: int = 4, xl: bool = False):
        super().__init__()
        self.in_channels = in_channels
        self.time = nn.Linear(1, WIDTH)
        self.label = nn.Linear(POOLED, WIDTH) if xl else None
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(in_channels, WIDTH, 3, padding=1))])
        inner = nn.Module()
        inner.transformer_blocks = nn.ModuleList([BasicTransformerBlock()])
        self.input_blocks.append(nn.ModuleList([nn.Identity(), inner]))
        self.out = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, x, timesteps, context=None, y=None, transformer_options=None):
        hidden = self.input_blocks[0](x)
        embedding = self.time(timesteps.reshape(-1, 1).to(x.dtype) / 1000)
        if self.label is not None:
            embedding = embedding + self.label(y)
        hidden = hidden + embedding[:, :, None, None]
        n, c, h, w = hidden.shape
        hidden = hidden.flatten(2).transpose(1, 2)
        hidden = self.input_blocks[1][1].transformer_blocks[0](hidden, context)
        return self.out(hidden.transpose(1, 2).reshape(n, c, h, w))


def alphas() -> torch.Tensor:
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


class Methods:
    """What a loaded model of either web UI can do. seen: texts with the sizes that they were encoded for."""

    seen: list

    def get_learned_conditioning(self, prompts):
        self.seen.append((prompts[0], prompts.width, prompts.height))
        g = torch.Generator().manual_seed(zlib.crc32(prompts[0].encode()))
        cross = torch.randn(1, 6, TEXT, generator=g)
        if not self.is_sdxl:
            return cross
        sizes = torch.tensor([[prompts.width / 100, prompts.height / 100]])
        return {"crossattn": cross, "vector": torch.cat([sizes, torch.randn(1, POOLED - 2, generator=g)], 1)}

    def encode_first_stage(self, x):
        small = nn.functional.avg_pool2d(x, 8)
        return torch.cat([small, small.mean(1, keepdim=True)], 1)

    def get_first_stage_encoding(self, x):
        return x

    def decode_first_stage(self, z):
        return nn.functional.interpolate(z[:, :3], scale_factor=8.0)


def equip(sd_model, net: UNet, *, xl: bool = False, prediction: str = "eps", file: str | None = None) -> None:
    """Give a stand-in's model these methods and marks."""
    sd_model.seen = []
    sd_model.is_sdxl, sd_model.is_sd1, sd_model.is_sd2 = xl, not xl, False
    sd_model.sd_checkpoint_info = SimpleNamespace(filename=file)
    for name in ("get_learned_conditioning", "encode_first_stage", "get_first_stage_encoding", "decode_first_stage"):
        function = getattr(Methods, name)
        object.__setattr__(sd_model, name, function.__get__(sd_model)) if isinstance(sd_model, nn.Module) else setattr(
            sd_model, name, function.__get__(sd_model)
        )
    sd_model.alphas_cumprod = alphas().float()
    sd_model.parameterization = prediction
    if hasattr(sd_model, "forge_objects_original"):
        model = sd_model.forge_objects_original.unet.model
        sigmas = ((1 - alphas()) / alphas()).sqrt().float()
        kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
        model.predictor = SimpleNamespace(prediction_type=kind, sigmas=sigmas)
        model.storage_dtype = model.computation_dtype = torch.float32
