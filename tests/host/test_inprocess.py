"""Loading, turned activations and training inside a real ComfyUI process: the checks of tests/host/scripts/*inprocess.py.

One process runs all checks of a script, so that ComfyUI is imported once, and with this repository off its import path.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
MINUTES = {"inprocess": 15, "runtime_inprocess": 20, "train_inprocess": 25}  # at most, on a slow machine
CHECKS = [
    (script, name)
    for script in MINUTES
    for name in re.findall(r"^@check\ndef (\w+)", (SCRIPTS / f"{script}.py").read_text("utf-8"), re.MULTILINE)
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, dict]]:
    """Script -> check -> its line of output. Filled by the first check of each script."""
    return {}


def run(script: str, host_dir: Path, work: Path) -> dict[str, dict]:
    for name in ("models/loras", "input", "output", "temp", "user", "custom_nodes"):
        (work / name).mkdir(parents=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), str(host_dir), str(work)],
        cwd=work,
        env=env,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES[script],
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"check"')]
    found = {one["check"]: one for one in map(json.loads, lines)}
    lost = {"ok": False, "detail": done.stderr[-3000:]}
    return {name: found.get(name, lost) for of, name in CHECKS if of == script}


@pytest.mark.parametrize(("script", "name"), CHECKS, ids=[f"{s}-{n}" for s, n in CHECKS])
def test_in_process(
    outcomes: dict, host_dir: Path, tmp_path_factory: pytest.TempPathFactory, script: str, name: str
) -> None:
    if script not in outcomes:
        outcomes[script] = run(script, host_dir, tmp_path_factory.mktemp(script))
    result = outcomes[script][name]
    assert result["ok"], result["detail"]
