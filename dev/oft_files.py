"""Make an OFT file for a model file, without training: random rotations in LyCORIS' Diag-OFT layout."""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Where a checkpoint's parts begin -> the prefix that LyCORIS gives the module names of that part.
_PARTS = {
    "model.diffusion_model.": "lora_unet_",
    "cond_stage_model.transformer.": "lora_te_",
    "": "lora_unet_",
}
ATTENTION = r"attn\d?\.(to_|qkv|proj)|self_attn|\.ff\.|mlp"


def write_random_oft(
    base: Path,
    target: Path,
    *,
    degrees: float = 20.0,
    block_size: int = 32,
    layers: str = ATTENTION,
    text_encoder: bool = True,
    seed: int = 0,
) -> int:
    """Write a Diag-OFT file that fits the model file `base`; returns the number of layers.

    Every layer with two or more dimensions whose name matches `layers`, and whose output size `block_size`
    divides, gets random blocks (count, block_size, block_size) whose largest angle is about `degrees`.
    Raises ValueError where nothing matches.
    """
    blocks: dict[str, torch.Tensor] = {}
    with safe_open(base, "pt") as file:
        names = sorted(file.keys())
        for name in names:
            prefix = next(p for p in _PARTS if name.startswith(p))
            module = name.removeprefix(prefix).removesuffix(".weight")
            rows = file.get_slice(name).get_shape()
            if not name.endswith(".weight") or len(rows) < 2 or rows[0] % block_size:
                continue
            if name.startswith("first_stage_model.") or not re.search(layers, module):
                continue
            if prefix.startswith("cond_stage") and not text_encoder:
                continue
            key = _PARTS[prefix] + module.replace(".", "_")
            generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) + seed) & 0x7FFFFFFF)
            # A random skew matrix with entries of deviation d has eigenvalues up to about 2 d sqrt(b); the
            # Cayley transform turns an eigenvalue q into the angle 2 atan(q); d is sqrt(2) times the blocks'.
            deviation = math.tan(math.radians(degrees) / 2) / (2 * math.sqrt(2 * block_size))
            shape = (rows[0] // block_size, block_size, block_size)
            blocks[f"{key}.oft_blocks"] = torch.randn(shape, generator=generator) * deviation
            blocks[f"{key}.alpha"] = torch.tensor(0.0)  # no limit on the rotation
    if not blocks:
        raise ValueError(f"{base.name}: no layer matches {layers!r}")
    metadata = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "diag-oft"}',
        "ss_network_dim": str(block_size),
        "ss_output_name": target.stem,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in blocks.items()}, target, metadata)
    return len(blocks) // 2
