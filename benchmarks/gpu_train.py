"""Training steps on the device: the methods of train_step.py on layers of SD1.5's and SDXL's UNet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import train_step
from apply import Peers
from gpu_common import MIB, Section, Setup, free, medians, peak_bytes, table
from torch import Tensor, nn
from train_step import Block, Method, Subject


@dataclass(frozen=True)
class Level:
    """Transformer blocks of one width; pixels: side of the picture's square that one token stands for."""

    width: int
    blocks: int
    pixels: int


#: Transformer blocks of the UNets, and the width of the text that they read.
SD15 = ([Level(320, 5, 8), Level(640, 5, 16), Level(1280, 5, 32), Level(1280, 1, 64)], 768)
#: A third of SDXL's, in its proportion of widths.
SDXL = ([Level(640, 3, 16), Level(1280, 20, 32)], 2048)
TINY = ([Level(64, 1, 16)], 64)


class Blocks(nn.ModuleList):
    """Blocks that run one after the other on the tokens of their level."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for block in self:
            x = block(x, context)
        return x


def stack(name: str, shape: tuple[list[Level], int], pixels: int, batch: int, dtype: torch.dtype, device: torch.device) -> Subject:
    """The transformer blocks of a UNet, every level on its own tokens, with random weights."""
    levels, text = shape
    with device:
        net = nn.ModuleList([Blocks(Block(level.width, text) for _ in range(level.blocks)) for level in levels])
    net.to(dtype)
    train_step.randomise(net)
    use_host_layers(net)
    g = torch.Generator(device).manual_seed(1)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device).to(dtype)

    inputs = [random(batch, max(1, (pixels // level.pixels) ** 2), level.width) for level in levels]
    context = random(batch, 77, text)

    def run() -> Tensor:
        # A level's first trained layer has to pass a gradient on to the level before, as in the UNet.
        total, carried = [], 0.0
        for level, x in zip(net, inputs, strict=True):
            y = level(x + carried, context)
            carried = y.mean()
            total.append(y.float().square().mean())
        return torch.stack(total)

    text = f"{name}, {pixels} px" + (f", batch {batch}" if batch > 1 else "")
    return Subject(text, net, run, dtype, device)


def use_host_layers(net: nn.Module) -> None:
    """Where ComfyUI is loaded, its own linear layers, which its trainer's adapters need; without an adapter they do the same."""
    if "comfy" not in sys.modules:
        return
    import comfy.ops

    for module in net.modules():
        if type(module) is nn.Linear:
            module.__class__ = comfy.ops.disable_weight_init.Linear


def plain_lora(subject: Subject, rank: int = 16) -> Method:
    """LoRA by its definition, W x + B A x: the unit of all figures, so that it needs no other package."""
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    g = torch.Generator(subject.device).manual_seed(2)
    for name in subject.targets:
        layer = subject.model.get_submodule(name)
        a = torch.randn(rank, layer.in_features, generator=g, device=subject.device) * layer.in_features**-0.5
        pairs[name] = nn.Parameter(a), nn.Parameter(torch.zeros(layer.out_features, rank, device=subject.device))

    def adapted(original: Callable, a: Tensor, b: Tensor) -> Callable:
        return lambda x: original(x) + nn.functional.linear(nn.functional.linear(x, a), b)

    @contextmanager
    def install() -> Iterator[None]:
        layers = [subject.model.get_submodule(name) for name in pairs]
        try:
            for layer, (a, b) in zip(layers, pairs.values(), strict=True):
                layer.__dict__["forward"] = adapted(layer.forward, a, b)
            yield
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)

    return Method(f"LoRA rank {rank}", [p for pair in pairs.values() for p in pair], install)


def check_first_step(subject: Subject, method: Method) -> None:
    """One forward and backward; raises RuntimeError if a trained number has no gradient, for then the method is not in effect."""
    method.begin()
    subject.loss().backward()
    method.finish()
    # Single numbers aside: ComfyUI's adapters keep their alpha as a parameter that nothing uses.
    missing = sum(p.grad is None and p.numel() > 1 for p in method.parameters)
    for p in method.parameters:
        p.grad = None
    if missing:
        raise RuntimeError(f"{missing} of {len(method.parameters)} parameters got no gradient")


def measure(subject: Subject, methods: list[Method], setup: Setup, section: Section) -> list[dict]:
    """Time and memory of a step of each method. Everything that stays between steps is there before memory is counted."""
    rows, ready = [], []
    frozen = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    for method in methods:
        if not section.has_time(f"{subject.name}: {method.name}"):
            continue
        with section.fence(f"{subject.name}: {method.name}"), method.install():
            check_first_step(subject, method)
            optimizer = torch.optim.AdamW(method.parameters, lr=1e-4)
            train_step.one_step(subject, method, optimizer)  # makes the optimizer's state
            saved = train_step.saved_bytes(subject, method)
            peak = peak_bytes(lambda m=method, o=optimizer: train_step.one_step(subject, m, o), setup)
            rows.append({
                "model": subject.name, "method": method.name, "layers": len(subject.targets), "model MiB": frozen / MIB,
                "parameters": sum(p.numel() for p in method.parameters), "saved MiB": saved / MIB,
                "peak MiB": None if peak is None else peak / MIB,
            })
            ready.append((method, optimizer))

    # One after the other in short turns, so that a change of the card's clock meets all of them.
    found: dict[str, list[tuple[float, float]]] = {}
    turns, steps = (1, 1) if setup.tiny else (2, 6)
    for _ in range(turns):
        for method, optimizer in ready:
            if method.name in found and not section.has_time(f"{subject.name}: second turn"):
                continue
            with section.fence(f"{subject.name}: {method.name}, timing"), method.install():
                step = {"step": lambda m=method, o=optimizer: train_step.one_step(subject, m, o)}
                found.setdefault(method.name, []).append(medians(step, setup, steps, warmup=2, budget=4.0)["step"])
    for row in rows:
        if row["method"] in found:
            row["ms"] = min(device for device, _ in found[row["method"]]) * 1e3
            row["host ms"] = min(host for _, host in found[row["method"]]) * 1e3
    return rows


def methods_for(subject: Subject, setup: Setup, section: Section) -> list[Method]:
    if not setup.peers:
        return [train_step.no_adapter(subject), plain_lora(subject), train_step.ours(subject, 32, False), train_step.ours(subject, 32, True)]
    notices: list[str] = []
    methods = [plain_lora(subject), *train_step.all_methods(subject, notices)]
    section.notices += [n for n in notices if n not in section.notices]
    if setup.quick:
        methods = [m for m in methods if "b=64" not in m.name]
    return methods


def subjects(setup: Setup, section: Section) -> list[tuple[str, Callable[[], Subject]]]:
    """Name -> how to make it; the most telling first, since the time limit cuts from the end."""
    device, dtype = setup.device, torch.bfloat16
    if setup.tiny:
        return [("tiny", lambda: stack("tiny blocks", TINY, 64, 1, dtype, device))]

    def unet(pixels: int) -> Subject:
        if setup.host_dir:
            with section.fence("ComfyUI's UNet; its transformer blocks' shapes instead"):
                return train_step.sd15(setup.host_dir, pixels, dtype, device)
        return stack("SD1.5 transformer blocks", SD15, pixels, 1, dtype, device)

    out = [
        ("SD1.5, 512 px", lambda: unet(512)),
        ("SDXL, 1024 px", lambda: stack("SDXL transformer blocks", SDXL, 1024, 1, dtype, device)),
        ("SDXL, 1024 px, batch 4", lambda: stack("SDXL transformer blocks", SDXL, 1024, 4, dtype, device)),
        ("SDXL, 512 px", lambda: stack("SDXL transformer blocks", SDXL, 512, 1, dtype, device)),
        ("SD1.5, 1024 px", lambda: unet(1024)),
    ]
    return out[:2] if setup.quick else out


def run(setup: Setup, section: Section) -> None:
    if setup.host_dir:
        with section.fence("ComfyUI"):
            Peers(setup.host_dir)  # imports it for this device
    for name, make in subjects(setup, section):
        if not section.has_time(name):
            continue
        with section.fence(name):
            subject = make()
            section.rows += measure(subject, methods_for(subject, setup, section), setup, section)
            del subject
        free()
    models = list(dict.fromkeys(r["model"] for r in section.rows))
    for model in models:
        rows = [r for r in section.rows if r["model"] == model and "ms" in r]
        unit = next((r for r in rows if r["method"].startswith("LoRA rank 16")), None)
        lines = []
        for r in rows:
            beyond = "–"
            if unit is not None:
                r["times LoRA"] = r["ms"] / unit["ms"]
                beyond = "–" if r["peak MiB"] is None else f"{r['peak MiB'] - unit['peak MiB']:+.0f}"
            lines.append([
                r["method"], f"{r['parameters'] / 1e6:.2f}", f"{r['ms']:.1f}", f"{r['host ms']:.1f}",
                f"{r['times LoRA']:.2f}" if "times LoRA" in r else "–",
                "–" if r["peak MiB"] is None else f"{r['peak MiB']:.0f}", beyond, f"{r['saved MiB']:.0f}",
            ])
        section.table.append(f"{model}, bfloat16, {rows[0]['layers']} layers:" if rows else f"{model}: nothing was timed")
        section.table += table(["method", "M numbers", "ms", "host ms", "x LoRA", "peak MiB", "beyond", "saved MiB"], lines)
