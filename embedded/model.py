"""The shipped weights, and the stock checkpoint made from them.

    python -m embedded FOLDER/oft_emoji.safetensors

writes one SD3-family checkpoint (about 265 MB: transformer, autoencoder, and the text encoder made from its seed) that
ComfyUI's CheckpointLoaderSimple reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import autoencoder, text_encoder

WEIGHTS = Path(__file__).resolve().parent / "weights"
CONTEXT, POOLED = 4096, 2048  # widths of SD3's text inputs; the shipped file leaves out the columns that are zero
PADDED = {"context_embedder.weight": CONTEXT, "y_embedder.mlp.0.weight": POOLED}


def checksums() -> dict[str, str]:
    """File name -> SHA-256 as written when the weights were made."""
    return json.loads((WEIGHTS / "checksums.json").read_text("utf-8"))


def read(name: str) -> dict[str, Tensor]:
    """The tensors of a shipped file. Raises ValueError where its bytes are not those that were made."""
    data = (WEIGHTS / name).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != checksums()[name]:
        raise ValueError(f"{name}: SHA-256 is {found}, expected {checksums()[name]}; the clone is damaged")
    return load_file(WEIGHTS / name)


def transformer() -> dict[str, Tensor]:
    """The transformer in ComfyUI's layout, float16, 4.9 M parameters of which 0.9 M are zero columns."""
    weights = read("transformer.safetensors")
    for name, width in PADDED.items():
        full = torch.zeros(len(weights[name]), width, dtype=weights[name].dtype)
        full[:, : text_encoder.WIDTH] = weights[name]
        weights[name] = full
    return weights


def vae() -> dict[str, Tensor]:
    """The autoencoder in TAESD's layout, float16."""
    return autoencoder.stock_state(read("autoencoder.safetensors"))


def ship(transformer_file: Path, autoencoder_file: Path) -> None:
    """Write trained float32 weights as shipped: float16, without zero columns, with their checksums."""
    cut = load_file(transformer_file)
    for name in PADDED:
        cut[name] = cut[name][:, : text_encoder.WIDTH]
    WEIGHTS.mkdir(exist_ok=True)
    sums = {}
    for name, tensors in (("transformer", cut), ("autoencoder", load_file(autoencoder_file))):
        path = WEIGHTS / f"{name}.safetensors"
        save_file({k: v.half().contiguous() for k, v in tensors.items()}, f"{path}.part")
        os.replace(f"{path}.part", path)
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (WEIGHTS / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", "utf-8")


def identity() -> str:
    """One SHA-256 of all shipped weights, which `build` writes into the checkpoint's metadata."""
    return hashlib.sha256(json.dumps(checksums(), sort_keys=True).encode()).hexdigest()


def is_current(path: Path) -> bool:
    """Whether `path` is a checkpoint that was built from these weights."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("oft_emoji.weights") == identity()


def build(path: Path) -> Path:
    """Write the stock checkpoint to `path` (to a temporary name first). Returns `path`."""
    parts = {
        "model.diffusion_model.": transformer(),
        "first_stage_model.": vae(),
        "text_encoders.clip_l.transformer.": text_encoder.state_dict(),
    }
    tensors = {prefix + k: v.contiguous() for prefix, part in parts.items() for k, v in part.items()}
    metadata = {"modelspec.title": "OFT emoji", "modelspec.license": "Apache-2.0", "modelspec.resolution": "64x64",
                "oft_emoji.weights": identity()}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata)
    os.replace(part, path)
    return path
