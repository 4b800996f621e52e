"""Host synchronisations and kernel launches a layer, counted in the profiler's trace, and the places that cause them.

Every scenario runs with few and with more layers; the difference gives what each further layer costs, the rest is once for all.
"""

from __future__ import annotations

import json
import os
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import gpu_train
import torch
import train_step
from gpu_common import Section, Setup, table
from torch.profiler import ProfilerActivity, profile, record_function

from oft_core import LayerRotation, Strength, build_all
from oft_core.activations import Change, Pipeline, terms_of
from oft_core.training import OFTConfig, RotationBank

MEASURED = "measured part"
#: Calls of the CUDA runtime in which the host waits for the card.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
#: Operators that hand a tensor's value to the host; on a CPU's tensor they cost nothing.
READS = ("aten::_local_scalar_dense", "aten::nonzero")


@dataclass
class Counts:
    """What happened in one run. places: (what waited or was read, operator around it, place in the code) -> times."""

    waits: int = 0
    to_host: int = 0
    to_card: int = 0
    reads: int = 0
    launches: int = 0
    places: Counter = field(default_factory=Counter)


# ---------------------------------------------------------------- reading a trace


def read_trace(events: Iterable[dict]) -> Counts:
    """Counts of a trace in Chrome's format, within the range named MEASURED; copies of the whole trace."""
    spans = [e for e in events if e.get("ph") == "X" and "ts" in e]
    ranges = [e for e in spans if e.get("name") == MEASURED and e.get("cat") == "user_annotation"]
    if not ranges:
        raise RuntimeError("the profiler's trace does not hold the measured range")
    begin, end = float(ranges[0]["ts"]), float(ranges[0]["ts"]) + float(ranges[0]["dur"])
    out = Counts()
    threads: dict[object, list[dict]] = {}
    for e in spans:
        name, category = e["name"], e.get("cat")
        if category == "gpu_memcpy":
            out.to_host += "DtoH" in name
            out.to_card += "HtoD" in name
        elif category in ("cuda_runtime", "cuda_driver", "cpu_op", "python_function") and begin <= float(e["ts"]) <= end:
            threads.setdefault(e.get("tid"), []).append(e)
    for spans_of_thread in threads.values():
        # Outer spans first, so that a stack of open spans is what encloses the next one.
        spans_of_thread.sort(key=lambda e: (float(e["ts"]), -float(e.get("dur", 0))))
        open_spans: list[dict] = []
        for e in spans_of_thread:
            at = float(e["ts"])
            while open_spans and float(open_spans[-1]["ts"]) + float(open_spans[-1].get("dur", 0)) <= at:
                open_spans.pop()
            name, category = e["name"], e["cat"]
            waits = category in ("cuda_runtime", "cuda_driver") and name in WAITS
            reads = category == "cpu_op" and name in READS
            out.launches += name in LAUNCHES
            out.waits += waits
            out.reads += reads
            if waits or reads:
                operators = [o["name"] for o in open_spans if o["cat"] == "cpu_op"]
                functions = [o["name"] for o in open_spans if o["cat"] == "python_function" and not o["name"].startswith("<")]
                ours = [f for f in functions if "oft_core" in f]
                place = (ours or functions or ["unknown place"])[-1]
                out.places[name, operators[-1] if operators else "–", short(place)] += 1
            open_spans.append(e)
    return out


def short(place: str) -> str:
    """A place in the code without the folders above the library or the package."""
    for mark in ("oft_core/", "benchmarks/", "site-packages/"):
        if mark in place:
            return mark + place.split(mark, 1)[1] if mark != "site-packages/" else place.split(mark, 1)[1]
    return place


def traced(run: Callable[[], object], setup: Setup) -> Counts:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if setup.cuda else [])
    setup.synchronise()
    with profile(activities=activities, with_stack=True) as profiler:
        with record_function(MEASURED):
            run()
        setup.synchronise()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        with open(path, encoding="utf-8", errors="replace") as f:
            return read_trace(json.load(f)["traceEvents"])


# ---------------------------------------------------------------- exact lines


def waiting_lines(run: Callable[[], object], setup: Setup) -> Counter:
    """Lines of Python in which torch itself sees a synchronising call -> times. torch does not see those of other libraries."""
    found: Counter = Counter()

    def note(message: Warning | str, category: type[Warning], *_args: object, **_more: object) -> None:
        if "called a synchronizing" in str(message):
            found[innermost(traceback.extract_stack()[:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if setup.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if setup.cuda:
                torch.cuda.set_sync_debug_mode("default")
    return found


def innermost(stack: list[traceback.FrameSummary]) -> str:
    """The last frame in the library, else the last one that is not of this module's own bookkeeping."""
    frames = [f for f in stack if not f.filename.endswith(("warnings.py", "gpu_sync.py"))]
    ours = [f for f in frames if "oft_core" in f.filename]
    if not frames:
        return "unknown place"
    frame = (ours or frames)[-1]
    return f"{short(frame.filename)}:{frame.lineno} {frame.name}"


# ---------------------------------------------------------------- scenarios


def weights_and_layers(count: int, setup: Setup, **more) -> tuple[list[torch.Tensor], list[LayerRotation]]:
    n = 64 if setup.tiny else 1280
    g = torch.Generator().manual_seed(count)
    layers = []
    for _ in range(count):
        packed = torch.randn(more.get("stages", 1), n // 32, 32 * 31 // 2, generator=g) * 0.02
        form = {k: v for k, v in more.items() if k not in ("stages", "dtype", "rows")}
        layer = LayerRotation(form.pop("side", "out"), 32, n // 32, generator=packed, **form)
        if more.get("rows"):
            layer.row_scale = torch.rand(n, generator=g) + 0.5
        layers.append(layer)
    dtype = more.get("dtype", torch.bfloat16)
    weights = [torch.randn(n, n, generator=g).mul_(n**-0.5).to(setup.device, dtype) for _ in range(count)]
    return weights, layers


def apply_at_hand(strength: Strength, **more) -> Callable[[int, Setup], Callable]:
    def make(count: int, setup: Setup) -> Callable[[], None]:
        weights, layers = weights_and_layers(count, setup, **more)
        built = build_all(layers, strength, setup.device)

        def run() -> None:
            for layer, w, b in zip(layers, weights, built, strict=True):
                layer.apply_(w, strength, rotation=b)

        return run

    return make


def apply_building(strength: Strength, **more) -> Callable[[int, Setup], Callable]:
    def make(count: int, setup: Setup) -> Callable[[], None]:
        weights, layers = weights_and_layers(count, setup, **more)

        def run() -> None:
            for layer, w in zip(layers, weights, strict=True):
                layer.apply_(w, strength)

        return run

    return make


def building_together(strength: Strength, resident: bool, **more) -> Callable[[int, Setup], Callable]:
    def make(count: int, setup: Setup) -> Callable[[], object]:
        _, layers = weights_and_layers(count, setup, **more)
        for layer in layers if resident else ():
            layer.generator = layer.generator.to(setup.device)
        return lambda: build_all(layers, strength, setup.device)

    return make


def turned_activations(side: str) -> Callable[[int, Setup], Callable]:
    def make(count: int, setup: Setup) -> Callable[[], None]:
        weights, layers = weights_and_layers(count, setup, side=side)
        at = Strength(0.8)
        pipelines = []
        for layer, w in zip(layers, weights, strict=True):
            terms = terms_of(layer, at, layer.build(at, setup.device), None, setup.device)
            pipelines.append((Pipeline([Change(0, len(w), terms)], len(w)), w))
        x = torch.randn(1, 77, weights[0].shape[1], device=setup.device).to(weights[0].dtype)

        def run() -> None:
            for pipeline, w in pipelines:
                pipeline(x, lambda v, w=w: torch.nn.functional.linear(v, w), lambda _: None, -1)

        return run

    return make


def training_step(method: str) -> Callable[[int, Setup], Callable]:
    """A whole step with everything that the training loop does in it but reading the loss. Eight trained layers a block."""

    def make(count: int, setup: Setup) -> Callable[[], None]:
        width = 64 if setup.tiny else 1280
        shape = ([gpu_train.Level(width, count // 8, 32)], 64 if setup.tiny else 2048)
        subject = gpu_train.stack("blocks", shape, 128 if setup.tiny else 512, 1, torch.bfloat16, setup.device)
        if method == "no adapter":
            return whole_step(subject, train_step.no_adapter(subject))
        if method == "LoRA":
            return whole_step(subject, gpu_train.plain_lora(subject))
        config = OFTConfig(oft_block_size=32, use_cayley_neumann=method == "series", target_modules=subject.targets)
        bank = RotationBank({"unet": (subject.model, config.select(subject.model))})
        chosen = train_step.Method(method, list(bank.parameters.values()), bank.installed, bank.begin_step, bank.finish_backward)
        return whole_step(subject, chosen, bank)

    return make


def whole_step(subject: train_step.Subject, method: train_step.Method, bank: RotationBank | None = None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(method.parameters, lr=1e-4)

    def run() -> None:
        with method.install():
            method.begin()
            subject.loss().backward()
            method.finish()
            torch.nn.utils.clip_grad_norm_(method.parameters, 1.0)
            optimizer.step()
            if bank is not None:
                bank.after_step(optimizer)
            optimizer.zero_grad(set_to_none=True)

    return run


#: Name -> (makes a run over that many layers, whether no layer may make the host wait).
SCENARIOS: dict[str, tuple[Callable[[int, Setup], Callable], bool]] = {
    "apply, out": (apply_at_hand(Strength(0.7)), True),
    "apply, in": (apply_at_hand(Strength(0.7), side="in"), True),
    "apply, in, fp8": (apply_at_hand(Strength(0.7), side="in", dtype=torch.float8_e4m3fn), True),
    "apply, linear, row factors": (apply_at_hand(Strength(0.7, "linear"), rows=True), True),
    "apply, butterfly": (apply_at_hand(Strength(0.7), stages=2, butterfly="peft"), True),
    "apply, building each": (apply_building(Strength(0.7)), False),
    "building together, file in RAM": (building_together(Strength(0.7), False), False),
    "building together, file on card": (building_together(Strength(0.7), True), True),
    "building together, series": (building_together(Strength(0.7), False, kind="neumann"), False),
    "turned activations, out": (turned_activations("out"), True),
    "turned activations, in": (turned_activations("in"), True),
    "step without adapter": (training_step("no adapter"), True),
    "step, LoRA": (training_step("LoRA"), True),
    "step, ours, exact": (training_step("exact"), True),
    "step, ours, series": (training_step("series"), True),
}


def count(name: str, make: Callable[[int, Setup], Callable], setup: Setup) -> dict:
    few, more = 8, 16
    counts: list[Counts] = []
    lines: list[Counter] = []
    for layers in (few, more):
        run = make(layers, setup)
        for _ in range(2):  # the second time nothing is set up any more
            run()
        lines.append(waiting_lines(run, setup))
        counts.append(traced(run, setup))
    first, second = counts
    row: dict = {"scenario": name, "layers": [few, more]}
    pairs = {n: (getattr(first, n), getattr(second, n)) for n in ("waits", "to_host", "to_card", "reads", "launches")}
    pairs["seen"] = lines[0].total(), lines[1].total()
    for what, (a, b) in pairs.items():
        row[what] = {"counts": [a, b], "each layer": (b - a) / (more - few), "once": a - (b - a) * few / (more - few)}
    row["places"] = [{"what": w, "operator": o, "place": p, "times": n} for (w, o, p), n in second.places.most_common(20)]
    row["lines"] = [{"place": p, "times": n} for p, n in lines[1].most_common(20)]
    return row


def run(setup: Setup, section: Section) -> None:
    for name, (make, strict) in SCENARIOS.items():
        if not section.has_time(name):
            continue
        with section.fence(name):
            row = count(name, make, setup)
            section.rows.append(row)
            if setup.cuda and not row["launches"]["counts"][1]:
                section.failed("profiler", "its trace holds no call of the CUDA runtime: only what torch itself sees is counted")
            each = max(row[what]["each layer"] for what in ("waits", "seen"))
            if strict and setup.cuda and each > 0:
                section.failed(name, f"the host waits {each:g} times a layer")
    lines = []
    for row in section.rows:
        shown = ("waits", "seen", "to_host", "to_card", "reads", "launches")
        parts = [f"{row[w]['each layer']:g} + {row[w]['once']:g}" for w in shown]
        lines.append([row["scenario"], *parts])
    section.table.append("a layer + once:")
    section.table += table(["scenario", "host waits", "seen by torch", "copies to host", "to card", "values read", "launches"], lines)
    where: Counter = Counter()
    for row in section.rows:
        seen = {p["place"] for p in row["lines"]}
        # What torch did not see itself, as waiting inside other libraries, by the operator around it.
        seen |= {f"{p['operator']} in {p['place']}" for p in row["places"] if p["what"] in WAITS}
        where.update(seen)
    section.table += [f"waits in {n} scenarios: {place}" for place, n in where.most_common(14)]
