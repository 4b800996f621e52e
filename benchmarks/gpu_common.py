"""What the sections of the GPU benchmark share: their record, their fence and time limit, timing, memory."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EIGHT_BIT = {"fp8 e4m3": torch.float8_e4m3fn, "fp8 e5m2": torch.float8_e5m2}
MIB = 1 << 20


@dataclass(frozen=True)
class Setup:
    """What is measured on. tiny: sizes for a dry run on a CPU; quick: fewer cells; peers: other tools, where they are installed."""

    device: torch.device
    tiny: bool = False
    quick: bool = False
    peers: bool = True
    host_dir: str | None = None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


@dataclass
class Section:
    """One section's record.

    rows: the full figures. table: its short form, lines of text. failures: what was raised or out of bounds; any makes the exit
    status non-zero. left_out: what the time limit cut. limit: seconds.
    """

    name: str
    limit: float
    rows: list[dict] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def has_time(self, what: str) -> bool:
        """Whether there is time for more; if not, ``what`` is noted as left out."""
        if time.monotonic() - self.started < self.limit:
            return True
        if what not in self.left_out:
            self.left_out.append(what)
        return False

    @contextmanager
    def fence(self, what: str) -> Iterator[None]:
        """An exception inside is recorded as a failure of ``what``, with its traceback, and what follows still runs."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (recorded with its traceback, and makes the exit status 1)
            text = f"{type(error).__name__}: {error}"
            self.failures.append({"what": what, "error": text[:2000], "traceback": traceback.format_exc()[-6000:]})
            # Tensors of the failed part hang on the traceback's frames.
            traceback.clear_frames(error.__traceback__)
            free()

    def failed(self, what: str, error: str) -> None:
        self.failures.append({"what": what, "error": error, "traceback": ""})

    def record(self) -> dict:
        names = ("seconds", "limit", "summary", "rows", "table", "notices", "failures", "left_out")
        return {"status": "failed" if self.failures else "ok", **{n: getattr(self, n) for n in names}}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds_of(run: Callable[[], object], setup: Setup) -> tuple[float, float]:
    """Seconds of one run on the device, from its start to its last kernel's end, and those until the host had asked for all of it."""
    if not setup.cuda:
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        return took, took
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(setup.device)
    start = time.perf_counter()
    begin.record()
    run()
    end.record()
    host = time.perf_counter() - start
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host


def medians(
    runs: Mapping[str, Callable[[], object]], setup: Setup, rounds: int, warmup: int = 2, budget: float = 5.0
) -> dict[str, tuple[float, float]]:
    """Median of the device's and the host's seconds of each, in rounds that run all of them in turn.

    One that has used up its budget (seconds, warm-up included) sits out, after one round at least.
    """
    spent = dict.fromkeys(runs, 0.0)
    for name, run in runs.items():
        for _ in range(warmup):
            if spent[name] < budget / 2:
                start = time.perf_counter()
                run()
                setup.synchronise()
                spent[name] += time.perf_counter() - start
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if taken[name] and spent[name] > budget:
                continue
            taken[name].append(seconds_of(run, setup))
            spent[name] += max(taken[name][-1])
    return {n: (statistics.median(t for t, _ in v), statistics.median(h for _, h in v)) for n, v in taken.items()}


def captured(run: Callable[[], object], setup: Setup) -> Callable[[], None]:
    """``run`` as one CUDA graph: replaying it costs the card's time without that of launching. Fails if ``run`` synchronises."""
    stream = torch.cuda.Stream(setup.device)
    stream.wait_stream(torch.cuda.current_stream(setup.device))
    with torch.cuda.stream(stream):  # a capture needs everything warm on a stream that is not the default one
        run()
    torch.cuda.current_stream(setup.device).wait_stream(stream)
    torch.cuda.synchronize(setup.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def peak_bytes(run: Callable[[], object], setup: Setup) -> int | None:
    """Most bytes that the allocator held at any moment of ``run`` beyond what it held before; None without CUDA."""
    if not setup.cuda:
        run()
        return None
    torch.cuda.synchronize(setup.device)
    before = torch.cuda.memory_allocated(setup.device)
    torch.cuda.reset_peak_memory_stats(setup.device)
    run()
    torch.cuda.synchronize(setup.device)
    return torch.cuda.max_memory_allocated(setup.device) - before


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of equal width."""
    cells = [list(head), *(list(r) for r in rows)]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
    out = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells]
    return [out[0], "-" * len(out[0]), *out[1:]]
