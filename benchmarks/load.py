"""Processor time from a file to changed weights, phase by phase: ours, ComfyUI's own OFT and its LoRA 16, in one run.

    python benchmarks/load.py --host-dir /path/to/ComfyUI                 an SDXL-shaped file of 700 layers
    python benchmarks/load.py --models SDXL Flux --threads 1 2            and a Flux-shaped one of 228; both with one thread and with two
    python benchmarks/load.py --share 0.1 --repeat 1                      a tenth of the layers, once

All three files have the same layers of the model, in float16; weights are float16, too. Every number is the shortest of several
rounds in which all candidates run in turn. Processor time is that of all threads together; what waits for another process is not in it.
See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from apply import processor
from safetensors.torch import save_file
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from oft_core import NameIndex, Strength, build_all, describe, load_adapter

PHASES = ("load", "report", "bind", "build", "apply")


def sdxl() -> dict[str, tuple[int, int]]:
    """Weights (out, in) of SDXL's 70 transformer blocks, by their names in ComfyUI."""
    out = {}
    depths = [(f"input_blocks.{i}.1", 640, 2) for i in (4, 5)] + [(f"input_blocks.{i}.1", 1280, 10) for i in (7, 8)]
    depths += [("middle_block.1", 1280, 10)]
    depths += [(f"output_blocks.{i}.1", 1280, 10) for i in (0, 1, 2)] + [(f"output_blocks.{i}.1", 640, 2) for i in (3, 4, 5)]
    for place, width, depth in depths:
        for i in range(depth):
            at = f"diffusion_model.{place}.transformer_blocks.{i}"
            for attention, context in (("attn1", width), ("attn2", 2048)):
                out[f"{at}.{attention}.to_q.weight"] = (width, width)
                out[f"{at}.{attention}.to_k.weight"] = out[f"{at}.{attention}.to_v.weight"] = (width, context)
                out[f"{at}.{attention}.to_out.0.weight"] = (width, width)
            out[f"{at}.ff.net.0.proj.weight"], out[f"{at}.ff.net.2.weight"] = (8 * width, width), (width, 4 * width)
    return out


def flux() -> dict[str, tuple[int, int]]:
    """Weights (out, in) of Flux's 19 double and 38 single blocks, by their names in ComfyUI."""
    out = {}
    for i in range(19):
        for part in ("img", "txt"):
            at = f"diffusion_model.double_blocks.{i}.{part}"
            out[f"{at}_attn.qkv.weight"], out[f"{at}_attn.proj.weight"] = (9216, 3072), (3072, 3072)
            out[f"{at}_mlp.0.weight"], out[f"{at}_mlp.2.weight"] = (12288, 3072), (3072, 12288)
    for i in range(38):
        at = f"diffusion_model.single_blocks.{i}"
        out[f"{at}.linear1.weight"], out[f"{at}.linear2.weight"] = (21504, 3072), (3072, 15360)
    return out


MODELS = {"SDXL": sdxl, "Flux": flux}


def file_key(name: str) -> str:
    return "lora_unet_" + name.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")


def write_files(folder: Path, shapes: dict[str, tuple[int, int]], block: int) -> tuple[Path, Path]:
    """An OFT file (kohya's, which ComfyUI reads as well) and a LoRA 16 file for all of the layers."""
    g = torch.Generator().manual_seed(0)
    oft, lora = {}, {}
    for name, (rows, columns) in shapes.items():
        key = file_key(name)
        oft[f"{key}.oft_blocks"] = (torch.randn(rows // block, block, block, generator=g) * 0.1 / block**0.5).half()
        oft[f"{key}.alpha"] = torch.tensor(0.0)
        lora[f"{key}.lora_up.weight"] = (torch.randn(rows, 16, generator=g) * 0.01).half()
        lora[f"{key}.lora_down.weight"] = (torch.randn(16, columns, generator=g) * 0.01).half()
        lora[f"{key}.alpha"] = torch.tensor(16.0)
    save_file(oft, folder / "oft.safetensors")
    save_file(lora, folder / "lora.safetensors")
    return folder / "oft.safetensors", folder / "lora.safetensors"


class Clock:
    """Processor and wall-clock seconds by phase, the shortest of all rounds."""

    def __init__(self) -> None:
        self.times: dict[str, tuple[float, float]] = {}

    def __call__(self, phase: str, run: Callable):
        cpu, wall = time.process_time(), time.perf_counter()
        result = run()
        took = time.process_time() - cpu, time.perf_counter() - wall
        self.times[phase] = tuple(map(min, took, self.times.get(phase, took)))
        return result

    def total(self, which: int) -> float:
        return sum(t[which] for t in self.times.values())


def ours(file: Path, weights: dict[str, Tensor], clock: Clock) -> None:
    strength = Strength()
    adapter = clock("load", lambda: load_adapter(file))
    clock("report", lambda: describe(adapter).to_text())
    patches = clock("bind", lambda: adapter.bind(NameIndex({k: w.shape for k, w in weights.items()})).patches)
    built = clock("build", lambda: build_all([p.op for p in patches], strength))

    def apply() -> None:
        for patch, rotation in zip(patches, built, strict=True):
            patch.apply_(weights[patch.key], strength, rotation=rotation)

    clock("apply", apply)


def cores(file: Path, weights: dict[str, Tensor], clock: Clock) -> None:
    """ComfyUI's loader; a weight goes through a float32 copy and back, as its model patcher does. Builds while it applies."""
    import comfy.lora
    import comfy.utils

    names = {file_key(k): k for k in weights}
    loaded = clock("load", lambda: comfy.lora.load_lora(comfy.utils.load_torch_file(str(file)), names))
    if len(loaded) != len(weights):
        raise RuntimeError(f"ComfyUI read {len(loaded)} of {len(weights)} layers")

    def apply() -> None:
        for key, adapter in loaded.items():
            wide = weights[key].to(torch.float32, copy=True)
            weights[key].copy_(comfy.lora.calculate_weight([(1.0, adapter, 1.0, None, None)], wide, key))

    clock("apply", apply)


def host(folder: str | None) -> str | None:
    """Make ComfyUI importable: its version, or None without one."""
    if not folder or not (Path(folder) / "comfy" / "weight_adapter" / "oft.py").is_file():
        return None
    sys.path.insert(0, folder)
    from comfy.cli_args import args

    args.cpu = args.cpu or not torch.cuda.is_available()
    version = Path(folder) / "comfyui_version.py"
    return version.read_text("utf-8").split('"')[1] if version.is_file() else "unknown"


def table(clocks: dict[str, Clock]) -> list[str]:
    lines = ["| | " + " | ".join(PHASES) + " | in all, CPU s | wall s | ours / it |", "|" + "---|" * (len(PHASES) + 4)]
    for name, clock in clocks.items():
        cells = [f"{clock.times[p][0]:.2f}" if p in clock.times else "–" for p in PHASES]
        cells += [f"{clock.total(0):.2f}", f"{clock.total(1):.2f}", f"{clocks['ours'].total(0) / clock.total(0):.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["SDXL"])
    parser.add_argument("--share", type=float, default=1.0, help="share of the layers that is taken, at random but always the same")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--host-dir", default=os.environ.get("OFT_HOST_DIR"), help="a ComfyUI folder, to measure its own loader")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    version = host(args.host_dir)
    machine = f"{processor()}, {os.cpu_count()} logical cores"
    print(f"Machine: {machine}; torch {torch.__version__}" + (f", ComfyUI {version}" if version else ""))
    if version is None:
        print("Notice: no ComfyUI (--host-dir or OFT_HOST_DIR): its own loader is not measured")
    record = []
    for model in args.models:
        shapes = MODELS[model]()
        chosen = random.Random(0).sample(list(shapes), max(1, round(args.share * len(shapes))))
        shapes = {name: shapes[name] for name in chosen}
        # One weight stands for all of a shape: a whole model would not fit many machines.
        each = {shape: (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).half() for shape in set(shapes.values())}
        weights = {name: each[shape] for name, shape in shapes.items()}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            oft, lora = write_files(Path(folder), shapes, args.block)
            for threads in args.threads:
                torch.set_num_threads(threads)
                candidates = {"ours": (ours, oft)}
                if version is not None:
                    candidates |= {"ComfyUI core OFT": (cores, oft), "ComfyUI core LoRA 16": (cores, lora)}
                clocks = {name: Clock() for name in candidates}
                for _ in range(args.repeat):
                    for name, (run, file) in candidates.items():
                        run(file, weights, clocks[name])
                print(f"\n{model}: {len(shapes)} layers, b = {args.block}, {threads} thread{'s' * (threads > 1)}\n")
                print("\n".join(table(clocks)), flush=True)
                record.append({"model": model, "layers": len(shapes), "threads": threads, "times": {n: c.times for n, c in clocks.items()}})
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "torch": torch.__version__, "runs": record}, indent=1), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
