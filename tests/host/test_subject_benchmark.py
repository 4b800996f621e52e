"""The pieces of benchmarks/subject.py (tests/host/scripts/subject_benchmark.py), all checks in one process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "subject_benchmark.py"
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CHECKS = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def outcome(host_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    for package in ("peft", "lycoris", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    work = tmp_path_factory.mktemp("subject")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, str(SCRIPT), str(host_dir), str(BENCHMARKS), str(work)]
    done = subprocess.run(
        command, cwd=work, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"check"')]
    found = {one["check"]: one for one in map(json.loads, lines)}
    return {name: found.get(name, {"ok": False, "detail": done.stderr[-3000:]}) for name in CHECKS}


@pytest.mark.parametrize("name", CHECKS)
def test_subject_benchmark(outcome: dict[str, dict], name: str) -> None:
    assert outcome[name]["ok"], outcome[name]["detail"]
