"""Time and memory of one training step: ours, LoRA, PEFT's OFT, ComfyUI's own trainer's OFT and LoRA, LyCORIS Diag-OFT, in one run.

    python benchmarks/train_step.py --host-dir PATH_TO_COMFYUI              the real SD1.5 UNet (random weights), 256 pixels
    python benchmarks/train_step.py --host-dir PATH_TO_COMFYUI --pixels 512 as the goals are stated
    python benchmarks/train_step.py --model sdxl                            SDXL-shaped attention blocks, without ComfyUI

    ... --dtype bfloat16                                                    as trainers run by default: frozen model in bfloat16, autocast

All methods train the query, key, value and output projections of every attention on the same frozen model, batch 1, AdamW, numbers
that are trained in float32. The row "no adapter" is the bound that no method can pass: the frozen model's forward pass and the
backward pass through it to the first of these layers. A step is forward, backward and optimizer. Methods run in turn, round after round; the shortest step of each counts. Saved memory is what
autograd keeps between forward and backward beyond the model's own weights, each storage counted once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent))

from oft_core.training import OFTConfig, RotationBank

CPU = torch.device("cpu")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


# ---------------------------------------------------------------- models


@dataclass
class Subject:
    """The frozen model, how to run it once, and the names of the layers that are trained.

    dtype: of the frozen model; bfloat16 runs under autocast to it. device: where it runs; ``run``'s inputs are there already.
    """

    name: str
    model: nn.Module
    run: Callable[[], Tensor]
    dtype: torch.dtype
    device: torch.device = CPU
    targets: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).to(self.device, self.dtype)
        self.targets = [
            n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n.endswith(TARGETS) and ".attn" in n
        ]

    def loss(self) -> Tensor:
        """Scalar float32 loss of one forward pass."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.run().float().square().mean()


def sd15(host_dir: str, pixels: int, dtype: torch.dtype, device: torch.device = CPU) -> Subject:
    """ComfyUI's SD1.5 UNet with random weights."""
    sys.path.insert(0, host_dir)
    sys.argv = [sys.argv[0], "--cpu"] if not torch.cuda.is_available() else sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.supported_models

    config = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3, "channel_mult": [1, 2, 4, 4],
        "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 768, "num_heads": 8,
        "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
        "use_temporal_resblock": False, "use_temporal_attention": False,
    }
    found = comfy.supported_models.SD15(config)
    found.set_inference_dtype(torch.float32, None)
    net = found.get_model({}, "", device=device).diffusion_model.to(device)
    randomise(net)
    x, t = torch.randn(1, 4, pixels // 8, pixels // 8).to(device, dtype), torch.tensor([500.0], device=device)
    context = torch.randn(1, 77, 768).to(device, dtype)
    return Subject(f"SD1.5 UNet, {pixels} px", net, lambda: net(x, t, context=context), dtype, device)


class Attention(nn.Module):
    def __init__(self, width: int, context: int):
        super().__init__()
        self.heads = width // 64
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (p(y).unflatten(-1, (self.heads, 64)).transpose(1, 2) for p, y in
                   ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        return self.to_out[0](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """SDXL's transformer block: self-attention, cross-attention, gated feed-forward."""

    def __init__(self, width: int, context: int = 2048):
        super().__init__()
        self.attn1, self.attn2 = Attention(width, width), Attention(width, context)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        a, gate = self.up(self.norm3(x)).chunk(2, dim=-1)
        return x + self.down(a * nn.functional.gelu(gate))


def sdxl(pixels: int, dtype: torch.dtype) -> Subject:
    """Two of SDXL's widest transformer blocks with the tokens that ``pixels`` gives there."""
    net = nn.ModuleList([Block(1280), Block(1280)])
    randomise(net)
    x, context = torch.randn(1, (pixels // 32) ** 2, 1280), torch.randn(1, 77, 2048)

    def run() -> Tensor:
        y = x.to(dtype)
        for block in net:
            y = block(y, context.to(dtype))
        return y

    return Subject(f"two SDXL blocks of 1280, {pixels} px", net, run, dtype)


def randomise(net: nn.Module) -> None:
    g = torch.Generator(next(net.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, device=g.device) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.02) + (1 if p.ndim == 1 else 0) * 0.5)


# ---------------------------------------------------------------- methods


@dataclass
class Method:
    """One way to train. install puts it into the model and takes it out again; around wraps forward and backward of a step."""

    name: str
    parameters: list[nn.Parameter]
    install: Callable[[], AbstractContextManager] = nullcontext
    begin: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None


def no_adapter(subject: Subject) -> Method:
    """A single trained number, added to the input of the first layer that the others adapt."""
    one = nn.Parameter(torch.zeros((), device=subject.device))
    first = subject.model.get_submodule(subject.targets[0])

    @contextmanager
    def install() -> Iterator[None]:
        handle = first.register_forward_pre_hook(lambda _, inputs: (inputs[0] + one.to(inputs[0].dtype), *inputs[1:]))
        try:
            yield
        finally:
            handle.remove()

    return Method("no adapter", [one], install)


def ours(subject: Subject, block: int, series: bool) -> Method:
    config = OFTConfig(oft_block_size=block, use_cayley_neumann=series, target_modules=subject.targets)
    bank = RotationBank({"unet": (subject.model, config.select(subject.model))})
    step = iter(range(1 << 30))
    return Method(
        f"this pack, b={block}, {'series' if series else 'exact'}", list(bank.parameters.values()), bank.installed,
        lambda: bank.begin_step(next(step)), bank.finish_backward,
    )


def peft_method(subject: Subject, name: str, config: object) -> Method:
    """A PEFT adapter; its layers replace the model's while it is installed."""
    from peft import inject_adapter_in_model

    before = {n: subject.model.get_submodule(n) for n in subject.targets}
    inject_adapter_in_model(config, subject.model)
    layers = {n: subject.model.get_submodule(n) for n in subject.targets}
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()  # PEFT's own get_peft_model does so; injecting gives them the frozen layer's dtype
    put(subject.model, before)

    @contextmanager
    def install() -> Iterator[None]:
        put(subject.model, layers)
        try:
            yield
        finally:
            put(subject.model, before)

    return Method(name, parameters, install)


def put(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, (nn.Sequential, nn.ModuleList)):
            owner[int(last)] = layer
        else:
            setattr(owner, last, layer)


def core_method(subject: Subject, name: str, adapter: type, rank: int) -> Method:
    """ComfyUI's trainable adapters as its Train LoRA node uses them: functions of the weight, in every forward."""
    made: dict[str, nn.Module] = {}
    for target in subject.targets:
        one = adapter.create_train(subject.model.get_submodule(target).weight, rank=rank, alpha=1.0)
        made[target] = one.to(subject.device).train().requires_grad_(True)
    parameters = [p for m in made.values() for p in m.parameters()]

    @contextmanager
    def install() -> Iterator[None]:
        for target, one in made.items():
            subject.model.get_submodule(target).weight_function = [one]
        try:
            yield
        finally:
            for target in made:
                subject.model.get_submodule(target).weight_function = []

    return Method(name, parameters, install)


def lycoris_method(subject: Subject, block: int) -> Method:
    from lycoris.modules.diag_oft import DiagOFTModule

    made = []
    for target in subject.targets:
        layer = subject.model.get_submodule(target)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        made.append((layer, DiagOFTModule(target.replace(".", "_"), plain, 1.0, block).to(subject.device)))
    parameters = [p for _, m in made for p in m.parameters() if p.requires_grad]

    @contextmanager
    def install() -> Iterator[None]:
        for layer, one in made:
            layer.__dict__["forward"] = one.forward
        try:
            yield
        finally:
            for layer, _ in made:
                layer.__dict__.pop("forward", None)

    for _, one in made:
        one.requires_grad_(True)
    return Method(f"LyCORIS Diag-OFT, b={block}", parameters or [p for _, m in made for p in m.parameters()], install)


def all_methods(subject: Subject, notices: list[str]) -> list[Method]:
    out = [no_adapter(subject)] + [ours(subject, b, series) for b in (32, 64) for series in (False, True)]
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig
        from peft import OFTConfig as PeftOFT

        names = list(subject.targets)
        out.insert(0, peft_method(subject, "LoRA rank 16 (PEFT)", LoraConfig(r=16, target_modules=names)))
        for exact in (False, True):
            config = PeftOFT(r=0, oft_block_size=32, target_modules=names, use_cayley_neumann=not exact)
            out.append(peft_method(subject, f"PEFT OFT, b=32, {'exact' if exact else 'series'}", config))
    else:
        notices.append("peft is not installed: no LoRA, no PEFT OFT")
    if importlib.util.find_spec("lycoris"):
        out.append(lycoris_method(subject, 32))
    else:
        notices.append("lycoris-lora is not installed")
    if "comfy" in sys.modules:
        from comfy.weight_adapter import LoRAAdapter, OFTAdapter

        out.append(core_method(subject, "ComfyUI core OFT, rank 32", OFTAdapter, 32))
        out.append(core_method(subject, "ComfyUI core LoRA rank 16", LoRAAdapter, 16))
    else:
        notices.append("without ComfyUI's own layers: no ComfyUI trainer")
    return out


# ---------------------------------------------------------------- measuring


def one_step(subject: Subject, method: Method, optimizer: torch.optim.Optimizer | None) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    method.begin()
    subject.loss().backward()
    method.finish()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def saved_bytes(subject: Subject, method: Method) -> int:
    """Bytes that autograd keeps after a forward, without the storages of the frozen model."""
    own = {p.untyped_storage().data_ptr() for p in subject.model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    method.begin()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = subject.loss()
    loss.backward()
    method.finish()
    for p in method.parameters:
        p.grad = None
    return sum(kept.values())


def measure(subject: Subject, methods: list[Method], rounds: int) -> list[dict]:
    optimizers = [torch.optim.AdamW(m.parameters, lr=1e-4) for m in methods]
    rows = [{"method": m.name, "parameters": sum(p.numel() for p in m.parameters), "seconds": float("inf")} for m in methods]
    for row, method in zip(rows, methods, strict=True):
        with method.install():
            row["saved_mib"] = saved_bytes(subject, method) / 2**20
    for _ in range(rounds):
        for row, method, optimizer in zip(rows, methods, optimizers, strict=True):
            with method.install():
                row["seconds"] = min(row["seconds"], one_step(subject, method, optimizer))
    return rows


def machine() -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    versions = [f"{p} {importlib.metadata.version(p)}" for p in ("peft", "lycoris-lora") if importlib.util.find_spec(p.split("-")[0])]
    return f"{name}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads; torch {torch.__version__}, {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--host-dir", default=os.environ.get("OFT_HOST_DIR"))
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="methods whose name contains one of these texts, beside LoRA of PEFT")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if options.model == "sd15" and not options.host_dir:
        parser.error("sd15 needs --host-dir, a ComfyUI folder")
    dtype = getattr(torch, options.dtype)
    subject = sd15(options.host_dir, options.pixels, dtype) if options.model == "sd15" else sdxl(options.pixels, dtype)
    notices: list[str] = []
    methods = all_methods(subject, notices)
    if options.only:
        methods = [m for m in methods if "LoRA rank 16 (PEFT)" == m.name or any(text in m.name for text in options.only)]
    rows = measure(subject, methods, options.rounds)
    unit = next((r for r in rows if r["method"].startswith("LoRA")), rows[0])
    print(f"Machine: {machine()}\n\n{subject.name}, {len(subject.targets)} layers, {options.dtype}, batch 1; unit: {unit['method']}\n")
    print("| method | parameters | step | time / unit | saved activations MiB | beyond unit MiB |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        r["ratio"] = r["seconds"] / unit["seconds"]
        print(f"| {r['method']} | {r['parameters'] / 1e6:.2f} M | {r['seconds']:.2f} s | {r['ratio']:.2f} | {r['saved_mib']:.0f} | "
              f"{r['saved_mib'] - unit['saved_mib']:+.0f} |")
    for notice in notices:
        print(f"\nLeft out: {notice}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "model": subject.name, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
