"""Time and memory of applying an OFT adapter to a weight: ours, ComfyUI's own loader, LyCORIS, PEFT and plain memcpy, in one run.

    python benchmarks/apply.py --quick                       a few shapes, about two minutes
    python benchmarks/apply.py --host-dir /path/to/ComfyUI   every distinct layer shape of SD1.5, SDXL and Flux
    python benchmarks/apply.py --quick --json out.json       the same numbers for programs

Every number is the shortest of several runs that are interleaved with those of the others, given as a multiple of copying the same
tensor. Peers are called through their own code; what is not installed is left out with a notice.
See benchmarks/README.md for what exactly each column does.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

# torch's profiler, which counts the memory, would write two lines to the terminal for every measurement.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from oft_core.adapter import Strength
from oft_core.blocks import piece_size
from oft_core.layer import LayerRotation
from oft_core.rotation import pack_skew

#: Distinct weights (out, in*kh*kw) by model: attention, feed-forward, and for SD1.5 the 3x3 convolutions.
SHAPES = {
    "SD1.5": [
        (320, 320), (320, 768), (640, 640), (640, 768), (1280, 1280), (1280, 768), (2560, 320), (320, 1280), (5120, 640),
        (640, 2560), (10240, 1280), (1280, 5120), (320, 2880), (640, 5760), (1280, 11520),
    ],
    "SDXL": [
        (640, 640), (1280, 1280), (640, 2048), (1280, 2048), (5120, 640), (640, 2560), (10240, 1280), (1280, 5120),
    ],
    "Flux": [(3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360), (21504, 3072)],
}
QUICK = [(320, 320), (1280, 1280), (1280, 2048), (10240, 1280), (3072, 3072)]
BLOCKS = [16, 32, 64, 128, 320]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MIB = 1 << 20
#: Block size from which torch's batched LU cannot be trusted on a CPU with two or more threads.
LU_TRAP = 145


@dataclass
class Cell:
    """One comparison. Times in seconds, memory in bytes beyond the weight and the adapter, None where a peer has no such thing."""

    shape: tuple[int, int]
    dtype: str
    threads: int
    side: str
    block: int
    asked: int
    times: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    rotation_bytes: int = 0

    @property
    def count(self) -> int:
        return self.shape[0 if self.side == "out" else 1] // self.block

    def ratio(self, name: str) -> float | None:
        return self.times[name] / self.times["memcpy"] if name in self.times else None

    @property
    def gemm_share(self) -> float | None:
        """Our operations per second over those of one large matrix product; None for small blocks, which memory limits."""
        if "gemm" not in self.times:
            return None
        return self.block * self.shape[0] * self.shape[1] / GEMM**3 * self.times["gemm"] / self.times["ours"]


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of ``size`` closest to ``wanted`` (the smaller of two), at least 2."""
    return min((d for d in range(2, size + 1) if size % d == 0), key=lambda d: (abs(d - wanted), d))


# ---- who is measured ------------------------------------------------------------------------------------------------


class Peers:
    """Which tools are there, and how each applies blocks to a weight."""

    def __init__(self, host_dir: str | None) -> None:
        self.notices: list[str] = []
        self.versions = {"torch": torch.__version__}
        self.core = self._core(host_dir)
        self.lycoris = self._package("lycoris", "lycoris-lora")
        self.peft = self._package("peft", "peft")

    def _package(self, module: str, distribution: str) -> bool:
        if importlib.util.find_spec(module) is None:
            self.notices.append(f"{distribution} is not installed: not measured")
            return False
        self.versions[distribution] = importlib.metadata.version(distribution)
        return True

    def _core(self, host_dir: str | None):
        if not host_dir:
            self.notices.append("no --host-dir and no OFT_HOST_DIR: ComfyUI's own loader is not measured")
            return None
        folder = Path(host_dir)
        if not (folder / "comfy" / "weight_adapter" / "oft.py").is_file():
            self.notices.append(f"{folder} holds no ComfyUI with comfy/weight_adapter/oft.py: its loader is not measured")
            return None
        sys.path.insert(0, str(folder))
        from comfy.cli_args import args

        # The loader asks for a device when it is imported.
        args.cpu = args.cpu or not torch.cuda.is_available()
        from comfy.weight_adapter.oft import OFTAdapter

        version = folder / "comfyui_version.py"
        text = version.read_text("utf-8") if version.is_file() else ""
        self.versions["ComfyUI"] = text.split('"')[1] if '"' in text else "unknown"
        return OFTAdapter

    def run_core(self, weight: Tensor, stored: Tensor) -> Callable[[], None]:
        """As ComfyUI patches a weight: a float32 copy (half precision only), its formula, back. Builds the rotation each time."""
        adapter = self.core(set(), (stored, None, 0, None))

        def formula(w: Tensor) -> Tensor:
            return adapter.calculate_weight(w, "weight", 1.0, 1.0, None, lambda x: x, torch.float32)

        if weight.dtype == torch.float32:
            return lambda: formula(weight)
        return lambda: weight.copy_(formula(weight.to(torch.float32, copy=True)))

    def run_lycoris(self, weight: Tensor, stored: Tensor) -> Callable[[], None]:
        """LyCORIS's own difference, added to the weight. Builds the rotation each time."""
        from lycoris.functional.diag_oft import diff_weight

        return lambda: weight.add_(diff_weight(weight, stored, None, constraint=0).to(weight.dtype))

    def run_peft(self, weight: Tensor, packed: Tensor) -> Callable[[], None]:
        """PEFT's merge of one layer, which builds one dense matrix of the whole input side."""
        import peft
        from peft.tuners.oft.layer import Linear

        base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        base.weight.data = weight
        size = weight.shape[1] // packed.shape[0]
        layer = Linear(base, "default", peft.OFTConfig(oft_block_size=size, r=0), r=0)
        layer.oft_R["default"].weight.data = packed

        def merge() -> None:
            layer.merge()
            layer.merged_adapters.clear()

        return merge


# ---- measuring ------------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that torch's allocator held during ``run`` beyond what it held before (results thrown away count until then)."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    events = (e for e in profile.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def shortest(runs: dict[str, Callable[[], object]], repeat: int, budget: float) -> dict[str, float]:
    """Shortest time of each, in rounds that run all of them in turn; one that has used up its budget (seconds) sits out."""
    best: dict[str, float] = {}
    spent = dict.fromkeys(runs, 0.0)
    for _ in range(repeat):
        for name, run in runs.items():
            if spent[name] > budget:
                continue
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
            spent[name] += took
            best[name] = min(best.get(name, took), took)
    return best


#: Side of the square float32 matrix product that stands for the machine's peak.
GEMM = 1024


def large_product() -> Callable[[], Tensor]:
    a, b, out = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM), torch.empty(GEMM, GEMM)
    return lambda: torch.mm(a, b, out=out)


def measure(cell: Cell, peers: Peers, repeat: int, budget: float, memory: bool) -> None:
    """Fill in the times and memory of one cell."""
    b, n = cell.block, cell.count
    generator = torch.Generator().manual_seed(b)
    stored = torch.randn(n, b, b, generator=generator) * (0.1 / b**0.5)
    packed = pack_skew(stored - stored.transpose(1, 2))
    cell.rotation_bytes = n * b * b * 4
    exact = cell.side == "out"
    # The same kind of file as the peer of that side reads: exact Cayley on the output side, PEFT's series on the input side.
    op = LayerRotation(cell.side, b, n, "cayley" if exact else "neumann", generator=packed.unsqueeze(0))
    strength = Strength()
    built = op.build(strength)
    source = torch.randn(cell.shape, generator=generator).to(DTYPES[cell.dtype])
    target = torch.empty_like(source)

    def weight() -> Tensor:
        return source.clone()

    ours, ours_build = weight(), weight()
    runs: dict[str, Callable[[], object]] = {
        "memcpy": lambda: target.copy_(source),
        "ours": lambda: op.apply_(ours, strength, rotation=built),
        "ours_build": lambda: op.apply_(ours_build, strength),
    }
    # Their batched inverse hangs, raises or lies there (pytorch issues 141358, 142815), and would take this process with it.
    trapped = cell.threads > 1 and n > 1 and b >= LU_TRAP
    if exact and peers.core is not None and not trapped:
        runs["core"] = peers.run_core(weight(), stored)
        # One column: the rotation is built, next to nothing is multiplied.
        runs["core_rotation"] = peers.run_core(torch.randn(cell.shape[0], 1), stored)
    if exact and peers.lycoris and not trapped:
        runs["lycoris"] = peers.run_lycoris(weight(), stored)
    if not exact and peers.peft:
        runs["peft"] = peers.run_peft(weight(), packed)
    plain = set(runs) - {"memcpy", "core_rotation"}
    if b >= 128:
        runs["gemm"] = large_product()
    with torch.no_grad():
        # Memory first: it warms everything up as well.
        if memory:
            # The profiler sees the calling thread only, so that has to do all of the work.
            torch.set_num_threads(1)
            cell.memory = {name: peak_bytes(run) for name, run in runs.items() if name in plain}
            torch.set_num_threads(cell.threads)
        cell.times = shortest(runs, repeat, budget)


# ---- reporting ------------------------------------------------------------------------------------------------------


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


COLUMNS = {
    "ours": "ours", "ours_build": "ours + building R", "core": "ComfyUI core", "lycoris": "LyCORIS", "peft": "PEFT",
}


def heading() -> str:
    """The first two lines of the table; every cell adds a row when it is done."""
    head = ["weight", "dtype", "threads", "side", "b", "memcpy ms", *COLUMNS.values(), "GEMM share", "extra MiB: ours", "+ building R"]
    head += ["core", "LyCORIS", "PEFT"]
    return "| " + " | ".join(head) + " |\n" + "|" + "---|" * len(head)


def row(c: Cell) -> str:
    out = [f"{c.shape[0]} x {c.shape[1]}", c.dtype, str(c.threads), c.side, str(c.block), f"{c.times['memcpy'] * 1e3:.2f}"]
    out += ["–" if (r := c.ratio(name)) is None else f"{r:.1f}" for name in COLUMNS]
    out.append("–" if c.gemm_share is None else f"{100 * c.gemm_share:.0f} %")
    out += [f"{c.memory[name] / MIB:.1f}" if name in c.memory else "–" for name in COLUMNS]
    return "| " + " | ".join(out) + " |"


def goals(cells: list[Cell]) -> list[dict]:
    """The goals with the worst cell of each; a goal that no cell tests is left out."""
    out = []

    def goal(text: str, worst: tuple[float, Cell] | None, met: Callable[[float], bool], unit: str) -> None:
        if worst is not None:
            value, cell = worst
            where = f"{cell.shape[0]}x{cell.shape[1]} {cell.dtype} b={cell.block} {cell.side}, {cell.threads} threads"
            out.append({"goal": text, "met": met(value), "worst": round(value, 2), "unit": unit, "where": where})

    def pick(values: list[tuple[float, Cell]], best: Callable) -> tuple[float, Cell] | None:
        return best(values, key=lambda v: v[0]) if values else None

    for threads in sorted({c.threads for c in cells}):
        mine = [c for c in cells if c.threads == threads]
        for side, limit in (("out", 3.5), ("in", 7.5)):
            few = [(c.ratio("ours"), c) for c in mine if c.dtype == "fp32" and c.block <= 32 and c.side == side]
            text = f"fp32, b <= 32, {side}put side, {threads} threads: at most {limit} x memcpy"
            goal(text, pick(few, max), lambda v, limit=limit: v <= limit, "x memcpy")
        big = [c for c in mine if c.shape == (10240, 1280) and c.dtype == "fp16" and c.asked == 32 and "core" in c.times]
        text = f"fp16 10240x1280, b = 32, {threads} threads: 3 x faster than ComfyUI core"
        goal(text + ", both building R", pick([(c.times["core"] / c.times["ours_build"], c) for c in big], min), lambda v: v >= 3, "x")
        formula = [((c.times["core"] - c.times["core_rotation"]) / c.times["ours"], c) for c in big]
        goal(text + ", without building R", pick(formula, min), lambda v: v >= 3, "x")
        wide = [(100 * c.gemm_share, c) for c in mine if c.gemm_share is not None and c.dtype == "fp32"]
        goal(f"fp32, b >= 128, {threads} threads: at least 60 % of the GEMM peak", pick(wide, min), lambda v: v >= 60, "%")
    chunks = 2 * 4 * piece_size(torch.device("cpu"))
    beyond = [((c.memory["ours"] - c.rotation_bytes - chunks) / MIB, c) for c in cells if "ours" in c.memory]
    goal("extra memory: at most one set of rotations and two chunks", pick(beyond, max), lambda v: v <= 0, "MiB beyond that")
    return out


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--shapes", nargs="+", help="instead of the models', e.g. 1280x1280", metavar="OUTxIN")
    parser.add_argument("--blocks", nargs="+", type=int, default=BLOCKS, help="the nearest divisor is taken")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "fp16"])
    parser.add_argument("--sides", nargs="+", choices=("out", "in"), default=["out", "in"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeat", type=int, default=15, help="rounds at most")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds that one candidate of one comparison may take in all")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--host-dir", default=os.environ.get("OFT_HOST_DIR"), help="a ComfyUI folder, to measure its own loader")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    peers = Peers(args.host_dir)
    if args.shapes:
        shapes = [tuple(int(n) for n in text.split("x")) for text in args.shapes]
    else:
        shapes = QUICK if args.quick else list(dict.fromkeys(s for model in args.models for s in SHAPES[model]))
    machine = f"{processor()}, {os.cpu_count()} logical cores"
    print(f"Machine: {machine}; " + ", ".join(f"{name} {version}" for name, version in peers.versions.items()))
    for notice in peers.notices:
        print(f"Notice: {notice}")
    if max(args.threads) > 1 and max(args.blocks) >= LU_TRAP:
        print(f"Notice: with more threads than one and blocks of {LU_TRAP} or more, ComfyUI core and LyCORIS are left out: "
              "the batched inverse that they call hangs or fails there")
    print("\nTimes as multiples of memcpy of the same tensor; extra memory beyond the weight and the stored adapter.\n")
    print(heading())
    cells: list[Cell] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in shapes:
            for side in args.sides:
                size = shape[0 if side == "out" else 1]
                taken = {nearest_divisor(size, wanted): wanted for wanted in reversed(args.blocks)}
                for b, wanted in sorted(taken.items()):
                    for dtype in args.dtypes:
                        cell = Cell(shape, dtype, threads, side, b, wanted)
                        measure(cell, peers, args.repeat, args.budget, not args.no_memory)
                        cells.append(cell)
                        print(row(cell), flush=True)
    found = goals(cells)
    print("\n| goal | met | worst | where |\n|---|---|---|---|")
    for g in found:
        print(f"| {g['goal']} | {'yes' if g['met'] else 'NO'} | {g['worst']} {g['unit']} | {g['where']} |")
    if args.json:
        record = {"machine": machine, "versions": peers.versions, "notices": peers.notices, "goals": found}
        record["cells"] = [asdict(c) for c in cells]
        Path(args.json).write_text(json.dumps(record, indent=1), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
