"""Stage 3: the transformer (SD3 family, patch 2, no qk-norm), a rectified flow on the latents of stage 2.

    OFT_HOST_DIR=<ComfyUI> python -m embedded.make.transformer WORK

writes WORK/transformer.safetensors (float32, averaged weights). The network is ComfyUI's own class. All filling
tokens of a caption are the same vector, so training keeps one of them with the logarithm of their number added in
attention: the same result as the stock 77 tokens at a third of the cost. Products run in bfloat16, weights, sums and
optimizer in float32. Goes on from WORK/transformer.state.pt where there is one. Seeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from embedded.make.optimizer import Optimizer
from embedded.text_encoder import END, POSITIONS, WIDTH, pooled, token_table

DEPTH = 3
CONTEXT, POOLED = 4096, 2048  # widths of SD3's context and pooled vector; only the first 768 are used here
TOKENS = 16  # 8 x 8 latents in patches of 2 x 2


def host_class() -> type:
    """ComfyUI's MMDiT, with attention that takes a bias. Needs OFT_HOST_DIR."""
    sys.path.insert(0, os.environ["OFT_HOST_DIR"])
    arguments, sys.argv = sys.argv, sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    from comfy.ldm.modules.diffusionmodules import mmdit

    sys.argv = arguments
    return mmdit


class Layers:
    """Plain torch layers under the names that ComfyUI's classes ask for."""

    Linear, Conv2d, LayerNorm = nn.Linear, nn.Conv2d, nn.LayerNorm


class Network(nn.Module):
    """The transformer with short contexts. Its `core` has the stock state dict."""

    def __init__(self, mmdit: object, depth: int = DEPTH) -> None:
        super().__init__()
        hidden = 64 * depth
        self.core = mmdit.OpenAISignatureMMDITWrapper(
            input_size=None, patch_size=2, in_channels=16, out_channels=16, depth=depth, adm_in_channels=POOLED,
            context_embedder_config={"target": "torch.nn.Linear",
                                     "params": {"in_features": CONTEXT, "out_features": hidden}},
            num_patches=64, pos_embed_max_size=8, pos_embed_scaling_factor=None, operations=Layers,
            dtype=torch.float32, device="cpu",
        )  # fmt: skip
        self.bias: Tensor | None = None
        mmdit.optimized_attention = self._attention
        for name, value in self.core.named_parameters():
            if "adaLN_modulation.1" in name or name.startswith("final_layer.linear") or value.ndim < 2:
                nn.init.zeros_(value)
            else:
                nn.init.xavier_uniform_(value.view(len(value), -1))
        for layer, std in ((self.core.t_embedder.mlp[0], 0.02), (self.core.t_embedder.mlp[2], 0.02),
                           (self.core.context_embedder, WIDTH**-0.5), (self.core.y_embedder.mlp[0], WIDTH**-0.5)):  # fmt: skip
            nn.init.normal_(layer.weight, std=std)
        for layer in (self.core.context_embedder, self.core.y_embedder.mlp[0]):
            layer.weight.data[:, WIDTH:] = 0
        grid = torch.as_tensor(mmdit.get_2d_sincos_pos_embed(hidden, 8), dtype=torch.float32)
        self.core.pos_embed.copy_(grid[None])

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int, **_: object) -> Tensor:
        batch, length, width = q.shape
        q, k, v = (t.reshape(batch, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) * (width // heads) ** -0.5 + self.bias
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(batch, length, width)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, bias: Tensor, pool: Tensor) -> Tensor:
        """Latents [B, 16, 8, 8], sigma [B] in 0..1, context [B, L, 768], bias [B, L], pooled [B, 768]."""
        core = self.core
        self.bias = F.pad(bias, (0, TOKENS))[:, None, None, :]
        tokens = core.x_embedder(x) + core.cropped_pos_embed(x.shape[-2:])
        first, _, last = core.y_embedder.mlp
        y = last(F.silu(F.linear(pool, first.weight[:, :WIDTH], first.bias)))
        condition = core.t_embedder(sigma * 1000, dtype=torch.float32) + y
        words = F.linear(context, core.context_embedder.weight[:, :WIDTH], core.context_embedder.bias)
        return core.unpatchify(core.forward_core_with_concat(tokens, condition, words), hw=x.shape[-2:])


class Captions:
    """Token vectors, attention biases and pooled vectors of captions; number 0 is the empty caption."""

    def __init__(self, texts: list[str]) -> None:
        from comfy.sd1_clip import SDTokenizer

        tokenizer = SDTokenizer()
        rows = []
        for text in ["", *texts]:
            ids = [token for token, _ in tokenizer.tokenize_with_weights(text)[0]]
            rows.append(ids[: ids.index(END) + 1])
        used = sorted({t for row in rows for t in row})
        self.table = token_table()[used].float()
        place = {t: i for i, t in enumerate(used)}
        self.length = torch.tensor([len(row) for row in rows])
        longest = int(self.length.max()) + 3
        self.tokens = torch.full((len(rows), longest), place[END])
        self.bias = torch.full((len(rows), longest), float("-inf"))
        pools = []
        for i, row in enumerate(rows):
            self.tokens[i, : len(row)] = torch.tensor([place[t] for t in row])
            self.bias[i, : len(row)] = 0
            self.bias[i, len(row) - 1] = math.log(POSITIONS - len(row) + 1)
            pools.append(pooled(self.table[self.tokens[i, : len(row)]]))
        self.pool = torch.stack(pools)

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Context, bias and pooled vector of captions [B], cut to the longest of them (in steps of four)."""
        length = min((int(self.length[chosen].max()) + 3) // 4 * 4, self.tokens.shape[1])
        return self.table[self.tokens[chosen, :length]], self.bias[chosen, :length], self.pool[chosen]


def batches(length: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """One epoch: captions of like length stand together, so that little is filled up."""
    order = torch.randperm(len(length), generator=generator)
    groups = [g[length[g].argsort()] for g in order.split(size * 16)]
    cut = [b for g in groups for b in g.split(size) if len(b) == size]
    return [cut[i] for i in torch.randperm(len(cut), generator=generator)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=10500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW: embeddings, norms, biases, modulation")
    parser.add_argument("--muon", type=float, default=3e-3, help="learning rate of Muon: the blocks' matrices")
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--stop", type=int, default=0, help="stop early, after this step, as if interrupted")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    network = Network(host_class(), options.depth)
    listed = json.loads((options.work / "captions.json").read_text("utf-8"))["captions"]
    texts = sorted({text for text, _ in listed})
    number = {text: i + 1 for i, text in enumerate(texts)}
    captions = Captions(texts)
    caption_of = torch.tensor([number[text] for text, _ in listed])
    latents = torch.from_numpy(np.load(options.work / "latents.npy"))
    lengths = captions.length[caption_of]

    matrices = [p for n, p in network.core.joint_blocks.named_parameters() if p.ndim == 2 and "adaLN" not in n]
    taken = {id(p) for p in matrices}
    optimizer = Optimizer(matrices, [p for p in network.parameters() if id(p) not in taken], options.muon, options.lr)
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(1)
    step, queue, losses = 0, [], []
    state_path = options.work / "transformer.state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        step, queue = state["step"], list(state["queue"])
        generator.set_state(state["generator"])
        network.core.load_state_dict(state["network"])
        average = state["average"]
        optimizer.load(state["optimizer"])

    def save() -> None:
        state = {"step": step, "queue": queue, "generator": generator.get_state(), "average": average,
                 "network": network.core.state_dict(), "optimizer": optimizer.state()}  # fmt: skip
        torch.save(state, f"{state_path}.part")
        os.replace(f"{state_path}.part", state_path)
        tensors = network.core.state_dict()
        names = [n for n, _ in network.core.named_parameters()]
        tensors.update(zip(names, average, strict=True))
        path = options.work / "transformer.safetensors"
        save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, f"{path}.part")
        os.replace(f"{path}.part", path)

    begun, first = time.time(), step
    while step < (options.stop or options.steps):
        queue = queue or batches(lengths, options.batch, generator)
        chosen = queue.pop()
        progress = step / options.steps
        decay = 1.0 if progress < 0.3 else 0.5 + 0.5 * math.cos(math.pi * (progress - 0.3) / 0.7)
        factor = min(1, (step + 1) / 100) * (0.98 * decay + 0.02)
        clean = latents[chosen].float()
        which = caption_of[chosen].clone()
        which[torch.rand(len(which), generator=generator) < 0.1] = 0
        noise = torch.randn(clean.shape, generator=generator)
        uniform, normal = torch.rand(len(clean), generator=generator), torch.randn(len(clean), generator=generator)
        spread = torch.rand(len(clean), generator=generator) < 0.2
        sigma = torch.where(spread, uniform, torch.sigmoid(normal + 0.3)).clamp(1e-3, 1)
        s = sigma[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            velocity = network((1 - s) * clean + s * noise, sigma, *captions.batch(which))
        loss = (velocity.float() - (noise - clean)).pow(2).mean()
        loss.backward()
        optimizer.step(factor)
        step += 1
        losses.append(loss.item())
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - keep)
        if step % 100 == 0:
            took = time.time() - begun
            print(f"{took:6.0f} s  step {step}  loss {np.mean(losses[-100:]):.4f}  {took / (step - first):.3f} s/step",
                  flush=True)  # fmt: skip
        if step % 1000 == 0:
            save()
    save()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
