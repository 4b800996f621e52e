"""Workflow pieces that the tests and the demo share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .client import Graph, Node


class Parts(NamedTuple):
    """Links to the three things that a text-to-image graph starts from."""

    model: Any
    clip: Any
    vae: Any


FAMILIES = ("sd15", "sd2", "sdxl", "sd3", "sd35", "flux")
_LATENT_NODE = {"sd15": "EmptyLatentImage", "sd2": "EmptyLatentImage", "sdxl": "EmptyLatentImage"}


def tiny_parts(g: Graph, family: str, *, full_depth: bool = False, layers: int = 3, seed: int = 0) -> Parts:
    """In-memory model, text encoders and VAE of any family (test node; a second or two)."""
    node = g.Tiny_Checkpoint(family=family, full_depth=full_depth, layers=layers, seed=seed)
    return Parts(node[0], node[1], node[2])


def stock_parts(g: Graph, family: str) -> Parts:
    """Model files through ComfyUI's own loader nodes.

    sd15 is one checkpoint; sd3 and sd35 come in parts; sd2 and sdxl are a diffusion model with in-memory text
    encoders, since their stock encoders are gigabytes.
    """
    if family == "sd15":
        node = g.CheckpointLoaderSimple(ckpt_name="tiny_sd15.safetensors")
        return Parts(node[0], node[1], node[2])
    model = g.UNETLoader(unet_name=f"tiny_{family}.safetensors", weight_dtype="default")
    if family in ("sd2", "sdxl"):
        tiny = g.Tiny_Checkpoint(family=family, full_depth=False, layers=3, seed=0)
        return Parts(model[0], tiny[1], tiny[2])
    clip = g.CLIPLoader(clip_name="clip_l.safetensors", type="sd3", device="default")
    vae = g.VAELoader(vae_name="tiny_sd3.safetensors")
    return Parts(model[0], clip[0], vae[0])


def text_to_image(
    g: Graph,
    parts: Parts,
    family: str,
    *,
    adapter: Callable[[Graph, Parts], Parts] | None = None,
    size: int = 64,
    steps: int = 2,
    cfg: float = 4.0,
    seed: int = 42,
    text: str = "a red cat on a table",
) -> Node:
    """Append encode, sample, decode and preview; returns the PreviewImage node.

    `adapter` may replace model and clip.
    """
    if adapter is not None:
        parts = adapter(g, parts)
    positive = g.CLIPTextEncode(clip=parts.clip, text=text)
    negative = g.CLIPTextEncode(clip=parts.clip, text="blurry")
    latent = g.add(_LATENT_NODE.get(family, "EmptySD3LatentImage"), width=size, height=size, batch_size=1)
    samples = g.KSampler(
        model=parts.model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=seed,
        steps=steps,
        cfg=1.0 if family == "flux" else cfg,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return g.PreviewImage(images=g.VAEDecode(samples=samples, vae=parts.vae))
