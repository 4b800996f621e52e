"""Turned activations inside a real ComfyUI process (tests/host/scripts/runtime_inprocess.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "runtime_inprocess.py"
CHECKS = re.findall(r"^@check\ndef (\w+)", SCRIPT.read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def outcome(host_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    work = tmp_path_factory.mktemp("runtime")
    for name in ("models/loras", "input", "output", "temp", "user", "custom_nodes"):
        (work / name).mkdir(parents=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(host_dir), str(work)],
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"check"')]
    found = {one["check"]: one for one in map(json.loads, lines)}
    return {name: found.get(name, {"ok": False, "detail": done.stderr[-3000:]}) for name in CHECKS}


@pytest.mark.parametrize("name", CHECKS)
def test_in_process(outcome: dict[str, dict], name: str) -> None:
    assert outcome[name]["ok"], outcome[name]["detail"]
