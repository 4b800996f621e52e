"""Speed on the device: applying rotations to weights, and building them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from apply import Peers
from gpu_common import DTYPES, MIB, Section, Setup, captured, medians, peak_bytes, seconds_of, table
from torch import Tensor

from oft_core import Built, LayerRotation, Strength, build_all
from oft_core.rotation import orthogonality_error, pack_skew

#: Distinct weights (out, in) of SDXL and Flux.
SHAPES = [(1280, 1280), (10240, 1280), (1280, 5120), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072)]
QUICK = [(1280, 1280), (10240, 1280), (3072, 12288)]
#: Bytes of different weights that are gone through in turn, so that none of them is still in the card's cache.
AT_ONCE = 256 * MIB
#: Weights that other tools are timed on: they take long, and far more than the cache is in between.
PEER_LAYERS = 4
#: Weights that building is timed on, one layer at a time.
BUILD_LAYERS = 8


# ---------------------------------------------------------------- apply


def each(run: Callable[..., object], *columns: Sequence) -> Callable[[], None]:
    """``run`` on every layer in turn."""

    def all_of_them() -> None:
        for values in zip(*columns, strict=True):
            run(*values)

    return all_of_them


def peer_runs(peers: Peers | None, weights: Sequence[Tensor], stored: Tensor, packed: Tensor, side: str) -> dict[str, Callable]:
    """Other tools on the first few weights; all of them build the rotation every time."""
    few = [w.clone() for w in weights[:PEER_LAYERS]]
    makers: dict[str, Callable[[Tensor], Callable]] = {}
    if peers is not None and side == "out" and peers.core is not None:
        makers["ComfyUI core"] = lambda w: peers.run_core(w, stored)
    if peers is not None and side == "out" and peers.lycoris:
        makers["LyCORIS"] = lambda w: peers.run_lycoris(w, stored)
    if peers is not None and side == "in" and peers.peft:
        makers["PEFT"] = lambda w: peers.run_peft(w, packed)
    return {name: each(lambda one: one(), [make(w) for w in few]) for name, make in makers.items()}


def apply_cell(shape: tuple[int, int], side: str, block: int, dtype: str, setup: Setup, section: Section, peers: Peers | None) -> None:
    """One row of figures: microseconds a weight."""
    kind = DTYPES[dtype]
    rows, cols = shape
    count = 4 if setup.tiny else max(2, min(80, -(-AT_ONCE // (rows * cols * kind.itemsize))))
    n = shape[0 if side == "out" else 1] // block
    g = setup.generator(block)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=setup.device)

    weights = [random(rows, cols).to(kind) for _ in range(count)]
    targets = [torch.empty_like(w) for w in weights]
    stored = random(n, block, block) * (0.1 / block**0.5)
    packed = pack_skew(stored - stored.transpose(1, 2))
    # Exact transforms keep the weights' size over any number of rounds.
    ops = [LayerRotation(side, block, n, generator=packed.unsqueeze(0).clone()) for _ in range(count)]
    strength = Strength()
    built = build_all(ops, strength, setup.device)
    at_hand = each(lambda op, w, b: op.apply_(w, strength, rotation=b), ops, weights, built)
    copy = each(lambda target, w: target.copy_(w), targets, weights)
    runs: dict[str, Callable] = {
        "copy": copy,
        "apply": at_hand,
        "build and apply": each(lambda op, w: op.apply_(w, strength), ops[:BUILD_LAYERS], weights[:BUILD_LAYERS]),
    }
    with torch.no_grad():
        row = {"shape": f"{rows}x{cols}", "side": side, "block": block, "dtype": dtype, "weights": count}
        peak = peak_bytes(lambda: ops[0].apply_(weights[0], strength, rotation=built[0]), setup)
        row["extra MiB"] = None if peak is None else peak / MIB
        if setup.cuda:
            with section.fence(f"graph of {shape} {side} b={block} {dtype}"):
                runs["copy, card"], runs["apply, card"] = captured(copy, setup), captured(at_hand, setup)
        rounds = 2 if setup.tiny else 10
        times = medians(runs, setup, rounds, budget=1.5)
        layers = {name: min(count, BUILD_LAYERS) if name.startswith("build") else count for name in times}
        row["us"] = {name: device / layers[name] * 1e6 for name, (device, _) in times.items()}
        row["us to launch"] = {name: host / layers[name] * 1e6 for name, (_, host) in times.items()}
        if kind != torch.float32 and block == 32:
            with section.fence(f"other tools on {shape} {side} {dtype}"):
                others = peer_runs(peers, weights, stored, packed, side)
                few = min(PEER_LAYERS, count)
                row["us"] |= {n: d / few * 1e6 for n, (d, _) in medians(others, setup, 3, warmup=1, budget=1.0).items()}
    row["copy GB/s"] = 2 * rows * cols * kind.itemsize / (row["us"].get("copy, card") or row["us"]["copy"]) / 1e3
    section.rows.append(row)


def ceilings(setup: Setup, section: Section) -> None:
    """What the card gives: copying a large tensor, and a large square product in each dtype."""
    size, side = (1 << 16, 64) if setup.tiny else (1 << 28, 8192)
    a, b = torch.randn(size, device=setup.device), torch.empty(size, device=setup.device)
    seconds = medians({"copy": partial(b.copy_, a)}, setup, 5)["copy"][0]
    section.summary["copy of 1 GiB" if not setup.tiny else "copy"] = f"{8 * size / seconds / 1e9:.0f} GB/s, read and written"
    del a, b
    for name, dtype in DTYPES.items():
        x = torch.randn(side, side, device=setup.device).to(dtype)
        out = torch.empty_like(x)
        seconds = medians({"mm": partial(torch.mm, x, x, out=out)}, setup, 5)["mm"][0]
        section.summary[f"product {side}^3, {name}"] = f"{2 * side**3 / seconds / 1e12:.1f} TFLOP/s"


def run_apply(setup: Setup, section: Section) -> None:
    with section.fence("ceilings"), torch.no_grad():
        ceilings(setup, section)
    peers = None
    if setup.peers:
        with section.fence("other tools"):
            peers = Peers(setup.host_dir)
            section.notices += peers.notices
    shapes = [(64, 96)] if setup.tiny else QUICK if setup.quick else SHAPES
    # One dtype after the other, so that a time limit takes away the least telling figures.
    for dtype in ("bf16", "fp32", "fp16"):
        for block in (32, 128):
            for shape in shapes:
                for side in ("out", "in"):
                    name = f"apply {shape[0]}x{shape[1]} {side} b={block} {dtype}"
                    if block > min(shape) or not section.has_time(name):
                        continue
                    with section.fence(name):
                        apply_cell(shape, side, block, dtype, setup, section, peers)
    section.table += [f"{k}: {v}" for k, v in section.summary.items()]
    section.table += apply_table(section.rows)


def apply_table(rows: Sequence[dict]) -> list[str]:
    """Times as multiples of copying the same tensor."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["side"], row["block"]), {})[row["dtype"]] = row
    others = [n for n in ("ComfyUI core", "LyCORIS", "PEFT") if any(n in r["us"] for r in rows)]
    lines = []
    for (shape, side, block), by in sorted(cells.items(), key=lambda item: (item[0][2], item[0][0], item[0][1])):
        line = [shape, side, str(block)]
        for dtype in DTYPES:
            us = by[dtype]["us"] if dtype in by else None
            if us is None:
                line.append("–")
                continue
            card = f"{us['apply, card'] / us['copy, card']:.1f}" if "apply, card" in us else "–"
            line.append(f"{card} / {us['apply'] / us['copy']:.1f} / {us['build and apply'] / us['copy']:.0f}")
        us = by.get("bf16", {}).get("us", {})
        line += [f"{us[n] / us['copy']:.0f}" if n in us else "–" for n in others]
        extra = by.get("bf16", {}).get("extra MiB")
        line += [f"{us['copy']:.1f}" if us else "–", "–" if extra is None else f"{extra:.0f}"]
        lines.append(line)
    head = ["weight", "side", "b", *DTYPES, *others, "copy us", "extra MiB"]
    note = "times copying the same tensor: the card alone / launched from Python / building R as well; the columns right of them: bf16"
    return [note, *table(head, lines)]


# ---------------------------------------------------------------- build


def sdxl_rows() -> list[int]:
    """Output sizes of the 700 linear layers in SDXL's 70 transformer blocks."""
    return [n for width, blocks in ((640, 10), (1280, 60)) for _ in range(blocks) for n in [width] * 8 + [8 * width, width]]


def flux_rows() -> list[int]:
    """Output sizes of the attention and feed-forward layers in Flux's 19 double and 38 single blocks."""
    return [9216, 3072, 12288, 3072] * 2 * 19 + [21504, 3072] * 38


def layers_of(rows: Iterable[int], block: int, kind: str, std: float) -> list[LayerRotation]:
    g = torch.Generator().manual_seed(block)
    packed = (torch.randn(1, n // block, block * (block - 1) // 2, generator=g) * std for n in rows)
    return [LayerRotation("out", block, p.shape[1], kind, generator=p) for p in packed]


def to_card(built: Iterable[Built | None], device: torch.device) -> list[Tensor]:
    return [b.matrices.to(device) for b in built if b is not None]


def fresh(layers: Iterable[LayerRotation]) -> list[LayerRotation]:
    """The same without what they have computed before."""
    return [replace(layer, _cache={}) for layer in layers]


def build_case(
    name: str, layers: list[LayerRotation], strength: Strength, setup: Setup, section: Section, share: float, cpu_limit: float
) -> None:
    """One row: seconds by way of building. share: of the model's layers that ``layers`` are; seconds are given for all of them."""
    resident = [replace(layer, generator=layer.generator.to(setup.device), _cache={}) for layer in layers]
    row: dict = {"case": name, "layers": len(layers), "share": share, "seconds": {}, "seconds, first time": {}}
    small = max(1, len(layers) // 8)

    def way(label: str, run: Callable[[list[LayerRotation]], object], source: list[LayerRotation]) -> None:
        """First time (nothing computed before), then the shortest of two more with what the layers keep."""
        if not section.has_time(f"{name}: {label}"):
            return
        with section.fence(f"{name}: {label}"):
            # A part of them first, which also starts the device's libraries; and says whether there is time for all of it.
            seconds_of(lambda: run(fresh(source[:small])), setup)
            part = seconds_of(lambda: run(fresh(source[:small])), setup)[0]
            if part * len(source) / small > cpu_limit:
                row["seconds"][label] = row["seconds, first time"][label] = part * len(source) / small / share
                row.setdefault("from a part", []).append(label)
                return
            mine = fresh(source)
            row["seconds, first time"][label] = seconds_of(lambda: run(mine), setup)[0] / share
            row["seconds"][label] = min(seconds_of(lambda: run(mine), setup)[0] for _ in range(2)) / share

    device = setup.device
    with torch.no_grad():
        way("CPU", lambda some: build_all(some, strength), layers)
        way("CPU + transfer", lambda some: to_card(build_all(some, strength), device), layers)
        way("card, file in RAM", lambda some: build_all(some, strength, device), layers)
        way("card, file on card", lambda some: build_all(some, strength, device), resident)
        way("card, layer by layer", lambda some: [layer.build(strength, device) for layer in some], layers)
        section_peak = peak_bytes(lambda: build_all(layers, strength, device), setup)
        row["MiB built"] = sum(layer.built_bytes(strength.mode) for layer in layers) / MIB / share
        row["peak MiB"] = None if section_peak is None else section_peak / MIB
        with section.fence(f"{name}: the same numbers"):
            few = layers[:small]
            here, there = build_all(few, strength), build_all(few, strength, device)
            row["difference"] = max(float((a.matrices - b.matrices.cpu()).abs().max()) for a, b in zip(here, there, strict=True))
            if layers[0].kind == "cayley":
                row["orthogonality"] = max(float(orthogonality_error(b.matrices.cpu().double()).max()) for b in there)
            if not row["difference"] < 1e-5:
                section.failed(f"{name}: the same numbers", f"built matrices differ by {row['difference']:.1e}")
    section.rows.append(row)


def run_build(setup: Setup, section: Section) -> None:
    cases = [
        ("SDXL b=32 cayley", sdxl_rows(), 32, "cayley", Strength(), 1),
        ("Flux b=32 cayley", flux_rows(), 32, "cayley", Strength(), 1),
        ("SDXL b=32 series", sdxl_rows(), 32, "neumann", Strength(), 1),
        ("SDXL b=32 cayley geodesic 0.7", sdxl_rows(), 32, "cayley", Strength(0.7, "geodesic"), 7),
        ("Flux b=128 cayley", flux_rows(), 128, "cayley", Strength(), 3),
        ("SDXL b=32 expm", sdxl_rows(), 32, "expm", Strength(), 3),
        ("SDXL b=128 geodesic 0.7", sdxl_rows(), 128, "cayley", Strength(0.7, "geodesic"), 13),
    ]
    if setup.tiny:
        cases = [
            ("tiny cayley", [64, 128] * 8, 32, "cayley", Strength(), 1),
            ("tiny geodesic", [64] * 8, 32, "cayley", Strength(0.7, "geodesic"), 1),
        ]
    elif setup.quick:
        cases = cases[:2]
    for name, rows, block, kind, strength, every in cases:
        if not section.has_time(name):
            continue
        with section.fence(name):
            some = rows[::every]
            build_case(name, layers_of(some, block, kind, 0.02), strength, setup, section, sum(some) / sum(rows), 6.0)
    ways = ["CPU", "CPU + transfer", "card, file in RAM", "card, file on card", "card, layer by layer"]
    lines = []
    for row in section.rows:
        line = [row["case"], f"{row['MiB built']:.0f}"]
        for way in ways:
            first, later = row["seconds, first time"].get(way), row["seconds"].get(way)
            mark = "~" if row["share"] < 1 or way in row.get("from a part", ()) else ""
            line.append("–" if first is None else f"{mark}{first * 1e3:.0f} / {later * 1e3:.0f}")
        lines.append([*line, f"{row['difference']:.0e}" if "difference" in row else "–"])
    section.table.append(f"milliseconds, first time / again; {torch.get_num_threads()} CPU threads; ~ from a part of the layers")
    section.table += table(["file", "MiB", *ways, "differ"], lines)
