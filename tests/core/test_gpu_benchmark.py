"""The GPU benchmark as a dry run on the CPU: every section runs, and errors stay within bounds. Times mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
SECTIONS = ["correctness", "apply", "build", "sync", "train"]


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny", "--no-peers", *options]
    # One thread: sums of tiny products do not gain by more, and the machine may be shared.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = run("--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("Nothing failed.")
    return json.loads(out.read_text("utf-8"))


def test_every_section_runs(figures: dict) -> None:
    assert list(figures["sections"]) == SECTIONS
    for name, section in figures["sections"].items():
        assert section["status"] == "ok", name
        assert section["failures"] == section["left_out"] == [], name
        assert section["rows"], name
        assert section["table"], name


def test_correctness(figures: dict) -> None:
    section = figures["sections"]["correctness"]
    groups = [r for r in section["rows"] if "roundings" in r]
    assert {(r["what"], r["source"]) for r in groups} == {(w, s) for w in ("weight", "activations") for s in ("forms", "golden")}
    for row in groups:
        assert row["cases"] > 100
        # Nothing but the last rounding is lost in a weight; in float32 a few of the sums' roundings as well.
        assert row["roundings"] < (10 if row["dtype"] == "fp32" else 1.01 if row["what"] == "weight" else 2.5), row
        assert row["dtype"] != "fp32" or row["error"] < 1e-4, row
    gradients = [r for r in section["rows"] if r["what"] == "gradient"]
    assert len(gradients) == 16
    assert all(r["error"] < (1e-5 if r["dtype"] == "fp32" else 0.05) for r in gradients)
    assert section["summary"]["golden merges"].startswith("85 of 85 ")


def test_rotations_are_the_same_wherever_they_are_built(figures: dict) -> None:
    for row in figures["sections"]["build"]["rows"]:
        assert row["difference"] < 1e-6
        assert row["orthogonality"] < 1e-5


def test_no_layer_reads_values_back(figures: dict) -> None:
    """A value that is read back makes the host wait on a GPU. Building an exact rotation does so once a call on the CPU only."""
    rows = {r["scenario"]: r for r in figures["sections"]["sync"]["rows"]}
    for name, row in rows.items():
        if name != "apply, building each" and name != "step, LoRA":
            assert row["reads"]["each layer"] == 0, name
    assert rows["step, ours, exact"]["reads"]["once"] > 0  # the angle cap's search, so that reading is seen at all


def test_a_time_limit_cuts(tmp_path: Path) -> None:
    """A section whose time is used up is cut, which is no failure."""
    out = tmp_path / "gpu.json"
    done = run("--minutes", "0", "--sections", "build", "sync", "--out", str(out))
    assert done.returncode == 0
    sections = json.loads(out.read_text("utf-8"))["sections"]
    assert all(s["left_out"] and not s["rows"] for s in sections.values())
    assert "Left out for lack of time" in done.stdout


# ---- what only a GPU would reach ------------------------------------------------------------------------------------


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import gpu_common
    import gpu_sync

    return SimpleNamespace(common=gpu_common, sync=gpu_sync)


def test_a_failure_is_fenced(modules: SimpleNamespace) -> None:
    section = modules.common.Section("some", 60.0)
    with section.fence("first"):
        raise ValueError("no good")
    with section.fence("second"):
        section.rows.append({})
    record = section.record()
    assert record["status"] == "failed"
    assert record["rows"] == [{}]
    (failure,) = record["failures"]
    assert failure["what"] == "first"
    assert failure["error"] == "ValueError: no good"
    assert "test_gpu_benchmark" in failure["traceback"]


def test_a_trace_of_a_gpu_is_counted(modules: SimpleNamespace) -> None:
    def span(category: str, name: str, ts: float, dur: float, tid: int = 1) -> dict:
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": tid}

    events = [
        span("cuda_runtime", "cudaStreamSynchronize", 1, 2),  # before the range
        span("user_annotation", modules.sync.MEASURED, 10, 100),
        span("python_function", "/there/oft_core/layer.py(7): apply_", 11, 50),
        span("python_function", "<built-in method to of Tensor object>", 12, 20),
        span("cpu_op", "aten::to", 13, 18),
        span("cpu_op", "aten::copy_", 14, 16),
        span("cuda_runtime", "cudaMemcpyAsync", 15, 2),
        span("cuda_runtime", "cudaStreamSynchronize", 18, 10),
        span("cpu_op", "aten::bmm", 40, 5),
        span("cuda_runtime", "cudaLaunchKernel", 41, 2),
        span("cuda_runtime", "cudaStreamSynchronize", 70, 2, tid=2),  # another thread, without Python
        span("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 16, 3, tid=7),
        span("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 90, 3, tid=7),
        {"ph": "i", "name": "something else", "ts": 20},
    ]
    counts = modules.sync.read_trace(events)
    assert (counts.waits, counts.to_host, counts.to_card, counts.reads, counts.launches) == (2, 1, 1, 0, 1)
    assert counts.places == {
        ("cudaStreamSynchronize", "aten::copy_", "oft_core/layer.py(7): apply_"): 1,
        ("cudaStreamSynchronize", "–", "unknown place"): 1,
    }


def test_waiting_lines_are_named(modules: SimpleNamespace) -> None:
    def waits() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at somewhere.cpp:1.)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = modules.sync.waiting_lines(waits, modules.common.Setup(torch.device("cpu")))
    assert sum(found.values()) == 1
    assert next(iter(found)).endswith(" waits")
