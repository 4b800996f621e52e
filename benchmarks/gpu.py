"""Correctness, speed, memory and host synchronisation of the library on a CUDA GPU, in one run of at most eight minutes.

    python benchmarks/gpu.py --out gpu.json                            needs torch, safetensors, numpy and this repository
    python benchmarks/gpu.py --host-dir PATH_TO_COMFYUI                also ComfyUI's own code, and SD1.5's real UNet (random weights)
    python benchmarks/gpu.py --quick --sections correctness apply      less of it
    python benchmarks/gpu.py --device cpu --tiny                       a dry run of everything in a few seconds

PEFT and LyCORIS are measured beside it where they are installed. A section that fails, or whose errors are out of bounds, is reported
with its traceback, the others still run, and the exit status is 1. Short tables come last; --out gets every figure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path

# torch's profiler, which counts synchronisations, would write to the terminal for every measurement.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from gpu_common import Section, Setup, free

#: Name -> (module, function, share of the time, heading). The time that one leaves goes to those after it.
SECTIONS = {
    "correctness": ("gpu_correctness", "run", 20, "Correctness against float64 on the CPU"),
    "apply": ("gpu_speed", "run_apply", 20, "Applying to weights"),
    "build": ("gpu_speed", "run_build", 14, "Building the rotations of a file"),
    "sync": ("gpu_sync", "run", 10, "Where the host waits for the card"),
    "train": ("gpu_train", "run", 36, "Training steps"),
}


def machine(device: torch.device) -> dict:
    out = {
        "torch": torch.__version__, "CUDA": torch.version.cuda, "Python": platform.python_version(), "device": str(device),
        "CPU": platform.processor() or platform.machine(), "CPU threads": torch.get_num_threads(),
        "float32 products": torch.get_float32_matmul_precision(),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text("utf-8", "replace").splitlines() if line.startswith("model name")]
        out["CPU"] = names[0] if names else out["CPU"]
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        out |= {
            "device": card.name, "capability": f"{card.major}.{card.minor}", "multiprocessors": card.multi_processor_count,
            "memory GiB": round(card.total_memory / 2**30, 1),
        }
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="fewer shapes, files, models and methods")
    parser.add_argument("--tiny", action="store_true", help="sizes for a dry run, whose times mean nothing")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for all sections; what it cuts is named")
    parser.add_argument("--host-dir", default=os.environ.get("OFT_HOST_DIR"), help="a ComfyUI folder, to measure its own code")
    parser.add_argument("--no-peers", action="store_true", help="measure no other tools, even where they are installed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where all figures are written as JSON")
    options = parser.parse_args(argv)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; --device cpu --tiny is the dry run")
    return options


def write(path: Path | None, record: dict) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=1), "utf-8")


def show(heading: str, section: Section) -> None:
    print(f"\n## {heading} ({section.seconds:.0f} s)")
    print("\n".join(section.table))
    for notice in section.notices:
        print(f"Notice: {notice}")
    if section.left_out:
        names = ", ".join(section.left_out[:4]) + (", ..." if len(section.left_out) > 4 else "")
        print(f"Left out for lack of time ({len(section.left_out)}): {names}")
    alike: dict[str, list[dict]] = {}
    for failure in section.failures:
        alike.setdefault(failure["traceback"] or failure["what"], []).append(failure)
    for first, *more in list(alike.values())[:6]:
        print(f"FAILED {first['what']}{f' and {len(more)} more in the same place' if more else ''}: {first['error'][:300]}")
        if first["traceback"]:
            print("\n".join(first["traceback"].strip().splitlines()[-9:-1]))
    if len(alike) > 6:
        print(f"... and {len(alike) - 6} more kinds of failure")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    peers = not options.no_peers
    setup = Setup(device, options.tiny, options.quick, peers, (options.host_dir or None) if peers else None)
    torch.manual_seed(0)
    record: dict = {"machine": machine(device), "options": {k: str(v) for k, v in vars(options).items()}, "sections": {}}
    end = time.monotonic() + 60 * options.minutes
    done: list[tuple[str, Section]] = []
    for i, name in enumerate(options.sections):
        module, function, share, heading = SECTIONS[name]
        rest = sum(SECTIONS[n][2] for n in options.sections[i:])
        section = Section(name, max(0.0, end - time.monotonic()) * share / rest)
        print(f"{name} ...", flush=True)
        with section.fence(name):
            getattr(importlib.import_module(module), function)(setup, section)
        section.seconds = time.monotonic() - section.started
        free()
        done.append((heading, section))
        record["sections"][name] = section.record()
        # After every section, so that a run that is stopped has what it got to.
        write(options.out, record)
    print("\n" + ", ".join(f"{k} {v}" for k, v in record["machine"].items()))
    for heading, section in done:
        show(heading, section)
    failures = sum(len(section.failures) for _, section in done)
    print(f"\n{failures} failures" if failures else "\nNothing failed.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
