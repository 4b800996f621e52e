"""Damaged, inconsistent and hostile adapter files: nothing but a right answer or a clear error may come of them.

    python tests/fuzz/fuzz.py --count 20000 [--seed N] [--only DIALECT]     by hand; prints a table, and every case that is neither

Every case is a file of a known writer with one to three mutations, read from the disk as a user's would be, described, bound to its
base model and applied at several strengths. Outcomes: ``ok``, ``clear error`` (an AdapterError that names file or module), ``raw
exception``, ``hang`` (more than 5 seconds of processor time), ``memory`` (more than ten times the file, from 64 MiB on), ``not
finite`` and ``not orthogonal`` (where every rotation of the adapter claims to be exact). A case is a pure function of (seed, number).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
sys.path.append(str(REPO))

from oft_core import (
    AdapterError,
    Diff,
    LayerRotation,
    NameIndex,
    ReadOptions,
    Strength,
    describe,
    load_adapter,
)

OK, ERROR = "ok", "clear error"
SECONDS, MEMORY_TIMES, MEMORY_FLOOR = 5.0, 10, 64 << 20
STRENGTHS = tuple(Strength(s, mode) for s, mode in ((1.0, "rotation"), (0.5, "rotation"), (-1.0, "rotation"), (0.7, "geodesic"), (0.5, "linear")))


@dataclass
class File:
    """What is written to the disk: tensors, metadata, PEFT's config if there is one; and the model it is for."""

    dialect: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict | None
    base: dict[str, tuple[int, ...]]
    raw: list[Callable[[bytearray], bytearray]] = field(default_factory=list)

    def copy(self) -> File:
        config = None if self.config is None else json.loads(json.dumps(self.config))
        return File(self.dialect, dict(self.tensors), dict(self.metadata), config, self.base)


def seeds() -> list[File]:
    """Files of every dialect: the golden cases, cut to six layers, and the samples of the format tests for the others."""
    found = []
    for case in sorted((REPO / "tests" / "golden" / "cases").iterdir()):
        path = next((p for p in sorted(case.glob("adapter*.safetensors"))), None)
        if path is None:
            continue
        with safe_open(path, "pt") as f:
            metadata = dict(f.metadata() or {})
        tensors = load_file(path)
        modules = sorted({re.split(r"\.b?oft_|_oft\.", k)[0] for k in tensors if "oft" in k})[:6]
        tensors = {k: t for k, t in tensors.items() if any(k.startswith(m) for m in modules)}
        config = case / "adapter_config.json"
        with safe_open(case / "base.safetensors", "pt") as f:
            base = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (not a dict)
        found.append(File(case.name, tensors, metadata, json.loads(config.read_text()) if config.is_file() else None, base))
    spec = importlib.util.spec_from_file_location("format_samples", REPO / "tests" / "core" / "test_formats.py")
    samples = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(samples)
    for dialect, (tensors, kw) in samples.SAMPLES.items():
        base = {f"{samples.Q}.weight": (samples.OUT, samples.IN)}
        found.append(File(dialect, dict(tensors), {}, kw.get("config"), base))
    # Every extra that an oft_R layer can have, at once; and the saved state of a whole PEFT model.
    head, rows = f"lora_unet_{samples.U}", torch.ones(samples.OUT)
    extras = {f"{head}.{s}": rows.clone() for s in ("dora_scale", "initial_norm", "dora_multiplier", "dora_log_multiplier_row")}
    extras |= {f"{head}.dora_log_multiplier_col": torch.zeros(samples.IN), f"{head}.oft_R.clipped_oft": torch.tensor(0.9)}
    extras |= {f"{head}.oft_R.scaled_oft": torch.tensor(True), f"{head}.oft_R.weight": samples.PACKED}
    base = {f"{samples.Q}.weight": (samples.OUT, samples.IN)}
    found.append(File("F12 with all extras", extras, {}, None, base))
    kron = {f"{head}.oft_R.weight": samples.PACKED, f"{head}.lokr_w1": torch.ones(4, 4), f"{head}.lokr_w2_a": torch.ones(samples.OUT // 4, 2)}
    kron |= {f"{head}.lokr_w2_b": torch.ones(2, samples.IN // 4), f"{head}.lora_magnitude_vector.weight": rows, f"{head}.alpha": torch.tensor(1.0)}
    found.append(File("F13 DoKr", kron, {}, None, base))
    state = {f"{samples.Q}.oft_R.default.weight": samples.PACKED, f"{samples.Q}.base_layer.weight": samples.W, "conv_in.weight": rows}
    found.append(File("F9 state", state, {}, None, base))
    return found


# ---------------------------------------------------------------- mutations: (random numbers, file) -> changed in place


def _key(rng: random.Random, file: File) -> str:
    return rng.choice(sorted(file.tensors)) if file.tensors else ""


def shape(rng: random.Random, file: File) -> None:
    key = _key(rng, file)
    t = file.tensors.get(key)
    if t is None:
        return
    ways: list[Callable[[], Tensor]] = [
        lambda: t.flatten(), lambda: t.unsqueeze(0), lambda: t.reshape(*t.shape, 1), lambda: torch.zeros(0, dtype=t.dtype),
        lambda: torch.zeros((), dtype=t.dtype), lambda: torch.cat([t.flatten(), t.flatten()]), lambda: t.flatten()[:-1],
    ]
    if t.ndim:
        ways += [
            lambda: t[:-1], lambda: torch.cat([t, t]), lambda: t[:1], lambda: t[:0], lambda: t.transpose(0, -1),
            lambda: t[..., :-1], lambda: torch.cat([t, t[..., :1]], -1), lambda: t.sum(0),
        ]
    file.tensors[key] = rng.choice(ways)().contiguous().clone()


def dtype(rng: random.Random, file: File) -> None:
    key = _key(rng, file)
    if key:
        kinds = [
            torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn,
            torch.float8_e5m2, torch.complex64,
        ]
        file.tensors[key] = file.tensors[key].to(rng.choice(kinds))


def values(rng: random.Random, file: File) -> None:
    key = _key(rng, file)
    t = file.tensors.get(key)
    if t is None or not t.numel() or not t.is_floating_point():
        return
    t = t.float().clone()
    flat = t.view(-1)
    kind = rng.randrange(8)
    if kind < 3:
        flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e8, 3e4, 1e-40])
    elif kind == 3:
        flat.mul_(rng.choice([0.0, -1.0, 1e-30, 1e3, 1e6, 1e8, 1e9, 1e12, 1e20]))
    elif kind == 4:
        flat.fill_(rng.choice([0.0, 1.0, -1.0, 1e4, 1e9]))
    else:
        flat.mul_(10 ** rng.uniform(-3, 3))
    file.tensors[key] = t.half() if rng.random() < 0.2 else t


def drop(rng: random.Random, file: File) -> None:
    file.tensors.pop(_key(rng, file), None)


SUFFIXES = (
    "oft_blocks", "oft_blocks.0", "oft_blocks.7", "oft_diag", "oft_r", "oft_s", "oft_R.weight", "oft_R.default.weight", "boft_R", "boft_s",
    "alpha", "rescale", "dora_scale", "initial_norm", "oft_R.scaled_oft", "oft_R.clipped_oft", "oft_R.cans_oft", "oft_R.cans_exp",
    "dora_log_multiplier", "dora_log_multiplier_col", "dora_multiplier", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b",
    "lora_magnitude_vector.weight", "oft_coft_metadata", "coft_eps_metadata", "scaled_oft_metadata", "oft_R.neumann_terms", "diff",
    "diff_b", "base_layer.weight", "oft_embedding_R.weight", "oft_rotation.weight", "oft_coft_buffer", "weight", "bias", "lora_up.weight",
)


def rename(rng: random.Random, file: File) -> None:
    key = _key(rng, file)
    if not key:
        return
    t = file.tensors.pop(key) if rng.random() < 0.7 else file.tensors[key]
    head = key.rpartition(".oft_")[0] or key.rpartition(".")[0] or key
    hostile = ("", "\x1b[2J", "../../x", "x" * 3000, "\u202e", "𝔬ft", "a..b", ".", "oft_blocks", "CON", "x\ny")
    ways = (
        lambda: f"{head}.{rng.choice(SUFFIXES)}", lambda: f"{rng.choice(hostile)}{key}", lambda: f"{key}{rng.choice(hostile)}",
        lambda: key.replace("_", ".", rng.randrange(4)), lambda: key.replace(".", "_", rng.randrange(4)),
        lambda: "base_model.model." + key, lambda: key.removeprefix("base_model.model."), lambda: key.replace("to_q", "to_k"),
    )
    file.tensors[rng.choice(ways)() or "x"] = t


def add(rng: random.Random, file: File) -> None:
    key = _key(rng, file)
    head = key.rpartition(".oft_")[0] or key.rpartition(".")[0] or key
    size = rng.choice([(), (1,), (0,), (7,), (24,), (24, 1), (4, 6), (4, 6, 6), (2, 4, 4, 4), (100000,), (1, 3)])
    file.tensors[f"{head}.{rng.choice(SUFFIXES)}"] = torch.randn(size, generator=torch.Generator().manual_seed(rng.randrange(999))) * rng.choice([0.1, 1.0, 100.0])


def swap(rng: random.Random, file: File) -> None:
    one, other = _key(rng, file), _key(rng, file)
    if one:
        file.tensors[one], file.tensors[other] = file.tensors[other], file.tensors[one]


NUMBERS = ("nan", "-1", "1e999", "0", "9" * 400, "x", "", "1e-9", "[]", "true", "null")


def metadata(rng: random.Random, file: File) -> None:
    known = ("ss_network_module", "ss_network_alpha", "ss_training_started_at", "ot_config", "modelspec.date", "ss_tag_frequency",
             "ss_network_args", "lycoris_config", "ss_base_model_version", *file.metadata)
    content = (
        *NUMBERS, "networks.oft", "networks.oft_v2", "lycoris.kohya", '{"oft_coft": true, "coft_eps": "x"}', '{"oft_coft": 1, "coft_eps": -1}',
        "{" * 2000, "2023-11-01", '{"a": {"b": 1e99}}', "sd_v2_v",
    )
    file.metadata[rng.choice(known)] = rng.choice(content)


def config(rng: random.Random, file: File) -> None:
    if file.config is None:
        file.config = {"peft_type": rng.choice(["OFT", "BOFT", "LORA"])}
    name = rng.choice(["r", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms", "peft_version", "peft_type", "bias"])
    file.config[name] = rng.choice([None, True, False, -1, 0, 1, 2, 1e9, "x", "0.16.0", "0.18.1", [], {}, "all", 0.5, 1e-9, 12, 10**30])


def damage(rng: random.Random, file: File) -> None:
    where, what = rng.random(), rng.randrange(256)

    def cut(data: bytearray) -> bytearray:
        return data[: int(len(data) * where)]

    def flip(data: bytearray) -> bytearray:
        if data:
            data[int(where * min(len(data), 400 if what % 2 else len(data))) % len(data)] ^= what or 1
        return data

    file.raw.append(rng.choice([cut, flip, flip, flip]))


MUTATIONS = (shape, shape, shape, dtype, values, values, values, drop, rename, rename, add, add, swap, metadata, config, damage)


def case(files: list[File], seed: int, number: int) -> tuple[File, str]:
    """The mutated file of one number, and what was done to it."""
    rng = random.Random(f"{seed}/{number}")
    file = files[number % len(files)].copy()
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        how = rng.choice(MUTATIONS)
        how(rng, file)
        done.append(how.__name__)
    return file, f"{file.dialect}: {', '.join(done)}"


# ---------------------------------------------------------------- outcomes


def orthogonal(op: LayerRotation, strength: Strength) -> bool:
    built = op.build(strength)
    if built is None:
        return True
    m = built.matrices.double()
    return bool(((m.transpose(-1, -2) @ m - torch.eye(m.shape[-1], dtype=m.dtype)).abs() < 1e-5).all())


def use(path: Path, base: dict[str, tuple[int, ...]]) -> str:
    """Everything that is done with a file; the outcome, or what it raises."""
    adapter = load_adapter(path, ReadOptions())
    describe(adapter).to_text()
    binding = adapter.bind(NameIndex(base), strict=False)
    describe(binding.adapter, binding, Strength()).to_json()
    g = torch.Generator().manual_seed(0)
    for strength in STRENGTHS:
        try:
            binding.check(strength)
        except AdapterError:
            continue
        for patch in binding.patches:
            if not patch.key.endswith("weight") and not isinstance(patch.op, Diff):
                continue
            w = torch.randn(base[patch.key], generator=g)
            view = w if patch.rows is None else w.narrow(0, *patch.rows)
            norm = view.flatten(1).norm(dim=1) if patch.op.needs_base else None
            patch.apply_(w, strength, measured=norm)
            if not bool(torch.isfinite(w).all()):
                return f"not finite ({patch.module}, {strength})"
            op = patch.op
            if isinstance(op, LayerRotation) and op.exact and not orthogonal(op, strength):
                return f"not orthogonal ({patch.module}, {strength})"
    return OK


def outcome(file: File, folder: Path) -> tuple[str, str]:
    """(class, details) of one file."""
    for old in folder.iterdir():
        old.unlink()
    path = folder / "adapter.safetensors"
    try:
        save_file({k: t.contiguous() for k, t in file.tensors.items()}, path, file.metadata or None)
    except Exception:  # noqa: BLE001 (such a file cannot be written at all, so there is nothing to try)
        return "not written", ""
    data = bytearray(path.read_bytes())
    for how in file.raw:
        data = how(data)
    path.write_bytes(data)
    if file.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(file.config))
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        found = use(path, file.base)
    except AdapterError as error:
        found = ERROR if error.file or error.module else f"raw exception (names neither file nor module: {error})"
    except Exception:  # noqa: BLE001 (that is the outcome, and it is reported)
        found = f"raw exception ({traceback.format_exc(limit=-3)})"
    if time.process_time() - begun > SECONDS:
        return "hang", f"{time.process_time() - begun:.0f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > max(MEMORY_FLOOR, MEMORY_TIMES * len(data)):
        return "memory", f"{grown >> 20} MiB for {len(data)} bytes"
    kind, _, details = found.partition(" (")
    return kind, details


def run(count: int, seed: int, only: str = "", say: Callable[[str], None] = lambda _: None) -> tuple[Counter, list[str]]:
    """Outcomes of ``count`` cases, and a line for each that is neither right nor a clear error."""
    files = [f for f in seeds() if only in f.dialect]
    counts: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            file, about = case(files, seed, number)
            kind, details = outcome(file, Path(folder))
            counts[kind] += 1
            if kind not in (OK, ERROR, "not written"):
                bad.append(f"case {seed}/{number}, {about}: {kind}; {details}")
                say(bad[-1])
    return counts, bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutated adapter files: a right answer or a clear error.")
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a seed's name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts, bad = run(options.count, options.seed, options.only, say=lambda text: print(text, flush=True))
    print(", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
