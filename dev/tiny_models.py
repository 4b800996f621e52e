"""Write tiny random model files that stock ComfyUI loaders accept.

usage: python tiny_models.py HOST_DIR MODELS_DIR     (with the host's Python; takes a few seconds)

    checkpoints/tiny_sd15                      SD1.5 UNet, CLIP-L, tiny autoencoder  CheckpointLoaderSimple
    diffusion_models/tiny_{sd2,sdxl,sd3,sd35}  one diffusion model each              UNETLoader
    text_encoders/clip_l                       full-size CLIP-L                      CLIPLoader
    vae/tiny_{sd15,sdxl,sd3,flux}              tiny autoencoders                     VAELoader
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def write_all(host_dir: Path, models_dir: Path) -> list[Path]:
    """Write every file; returns their paths. Each file appears under its name only when complete."""
    sys.path[:0] = [str(host_dir), str(Path(__file__).resolve().parent / "host_nodes")]
    from comfy.cli_args import args

    args.cpu = True  # must be set before model_management is imported
    import json

    import comfy.clip_model
    import comfy.ops
    import families
    import torch
    from safetensors.torch import save_file

    written = []

    def save(state: dict, relative: str) -> None:
        path = models_dir / f"{relative}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({k: v.contiguous() for k, v in state.items()}, part)
        os.replace(part, path)
        written.append(path)

    config = json.loads((host_dir / "comfy" / "sd1_clip_config.json").read_text())
    encoder = comfy.clip_model.CLIPTextModel(config, torch.float32, "meta", comfy.ops.disable_weight_init)
    clip_l = families.random_state(encoder)
    save(clip_l, "text_encoders/clip_l")
    for family in ("sd15", "sdxl", "sd3", "flux"):
        save(families.taesd_state(family), f"vae/tiny_{family}")
    for name in families.STOCK:
        if name != "tiny_sd15":
            save(families.stock_unet_state(name), f"diffusion_models/{name}")
    checkpoint = families.stock_unet_state("tiny_sd15", prefix="model.diffusion_model.")
    checkpoint |= {f"cond_stage_model.transformer.{k}": v for k, v in clip_l.items()}
    checkpoint |= families.taesd_state("sd15", prefix="first_stage_model.")
    save(checkpoint, "checkpoints/tiny_sd15")
    return written


def main() -> None:
    host_dir, models_dir = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    sys.argv[1:] = []  # ComfyUI parses the command line on import
    begun = time.monotonic()
    for path in write_all(host_dir, models_dir):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path.relative_to(models_dir)}")
    print(f"{time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
