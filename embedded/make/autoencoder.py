"""Stage 2: the autoencoder, trained from nothing on the pictures and sprites of stage 1.

    python -m embedded.make.autoencoder WORK

writes WORK/autoencoder.safetensors (float32) and WORK/latents.npy (float16, [N, 16, 8, 8], one for each picture).
Convolutions run in bfloat16, everything that is kept in float32. ``--decoder-only`` goes on with the decoder alone
on fixed latents, beside stage 3, and writes WORK/autoencoder_tuned.safetensors; called again, it goes on from
that. Seeded; bit-identical only on the same kind of processor.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedded.autoencoder import decoder, encoder
from embedded.make.optimizer import Optimizer

BATCH = 16


def edges(x: Tensor) -> Tensor:
    return torch.cat([x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]], 1)


def difference(y: Tensor, x: Tensor, squared: float) -> Tensor:
    """L1 of pixels, of edges and of two coarser sizes, and a share of squared error."""
    loss = (y - x).abs().mean() + (edges(y) - edges(x)).abs().mean() + squared * (y - x).pow(2).mean()
    for k in (2, 4):
        loss = loss + (F.avg_pool2d(y, k) - F.avg_pool2d(x, k)).abs().mean()
    return loss


def psnr(y: Tensor, x: Tensor) -> float:
    """Peak signal to noise ratio in dB of pictures in 0..1."""
    return -10 * math.log10((y.clamp(0, 1) - x).pow(2).mean().item())


def picture_batch(pictures: Tensor, sprites: Tensor, generator: torch.Generator) -> Tensor:
    """Random pictures in 0..1 [16, 3, 64, 64]: half captioned ones, half sprites on white or on any one colour.

    Half of them mirrored, a quarter with swapped colour channels.
    """
    def some(source: Tensor) -> Tensor:
        chosen = torch.randint(len(source), (BATCH // 2,), generator=generator)
        return source[chosen].permute(0, 3, 1, 2).float().div(255)

    loose = some(sprites)
    plain = torch.rand(BATCH // 2, 3, 1, 1, generator=generator)
    plain[torch.rand(BATCH // 2, generator=generator) < 0.6] = 1
    alpha = loose[:, 3:]
    batch = torch.cat([some(pictures), loose[:, :3] * alpha + plain * (1 - alpha)])
    for i in range(0, BATCH, 4):
        batch[i] = batch[i, torch.randperm(3, generator=generator)]
    turned = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
    return torch.where(turned, batch.flip(-1), batch)


def save(path: Path, parts: dict[str, nn.Module]) -> None:
    tensors = {f"{name}.{k}": v.contiguous() for name, net in parts.items() for k, v in net.state_dict().items()}
    save_file(tensors, f"{path}.part")
    os.replace(f"{path}.part", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon", type=float, default=5e-3, help="learning rate of Muon")
    parser.add_argument("--squared", type=float, default=20.0, help="weight of the squared error at the end")
    parser.add_argument("--decoder-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(int(options.decoder_only))
    generator = torch.Generator().manual_seed(int(options.decoder_only))
    pictures, sprites = (torch.from_numpy(np.load(options.work / f"{name}.npy")) for name in ("pictures", "sprites"))
    held = torch.from_numpy(np.load(options.work / "held.npy")).permute(0, 3, 1, 2).float().div(255)
    source = options.work / "autoencoder.safetensors"
    path = options.work / "autoencoder_tuned.safetensors" if options.decoder_only else source
    parts = {"taesd_encoder": encoder(), "taesd_decoder": decoder()}
    nn.init.constant_(parts["taesd_decoder"][-1].bias, 0.5)
    if options.decoder_only:
        weights = load_file(path if path.exists() else source)
        for name, net in parts.items():
            net.load_state_dict({k[len(name) + 1 :]: v for k, v in weights.items() if k.startswith(name)})
        parts["taesd_encoder"].requires_grad_(False)
    encode, decode = parts["taesd_encoder"], parts["taesd_decoder"]
    trained = [p for net in parts.values() for p in net.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.ndim == 4 and min(p.shape[:2]) >= 32]
    taken = {id(p) for p in kernels}
    optimizer = Optimizer(kernels, [p for p in trained if id(p) not in taken], options.muon, options.lr)
    begun = time.time()
    for step in range(options.steps):
        progress = step / options.steps
        x = picture_batch(pictures, sprites, generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not options.decoder_only):
                z = encode(x)
            most = 0.04 if options.decoder_only else 0.08
            noise = most * torch.rand(BATCH, 1, 1, 1, generator=generator) * torch.randn(z.shape, generator=generator)
            y = decode(z + noise)
        z, y = z.float(), y.float()
        # More and more by squared error: that is what the noise ratio is measured by.
        squared = options.squared if options.decoder_only else 2 + (options.squared - 2) * progress
        loss = difference(y, x, squared)
        if not options.decoder_only:
            mean, std = z.mean((0, 2, 3)), z.var((0, 2, 3)).add(1e-6).sqrt()
            loss = loss + 0.05 * (mean.pow(2).mean() + (std - 1).pow(2).mean())
        loss.backward()
        optimizer.step(min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress) + 0.005))
        if step % 100 == 99:
            with torch.no_grad():
                quality = psnr(decode(encode(held)), held)
            took = time.time() - begun
            print(f"{took:6.0f} s  step {step + 1}  loss {loss.item():.4f}  held-out {quality:.2f} dB", flush=True)
        if step % 1000 == 999:
            save(path, parts)
    save(path, parts)
    if not options.decoder_only:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            batches = pictures.split(64)
            latents = [encode(b.permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last))
                       for b in batches]  # fmt: skip
        np.save(options.work / "latents.npy", torch.cat(latents).half().numpy())


if __name__ == "__main__":
    main()
