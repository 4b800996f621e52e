"""Our name index against ComfyUI's own key maps, on its full models (shapes only, in its own process)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "names_oracle.py"
REPO = Path(__file__).resolve().parents[2]

# Fewer would mean that the script compares next to nothing.
LEAST_ALIASES = {
    "sd1": 2600,
    "sd2": 2600,
    "sdxl": 6900,
    "sd3": 2000,
    "sd3.5 large": 4000,
    "sd3.5 medium": 3000,
    "flux": 3000,
    "pixart": 1500,
    "auraflow": 900,
    "z-image": 1500,
    "qwen": 400,
    "ltx": 1000,
    "wan": 150,
    "sd1 text encoders": 300,
    "sd2 text encoders": 600,
    "sdxl text encoders": 900,
    "sd3 text encoders": 1400,
    "flux text encoders": 900,
    "open_clip": 36,
}


@pytest.fixture(scope="module")
def comparison(host_dir: Path) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(host_dir), str(REPO)],
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
        env=env,
        cwd=host_dir,
    )
    start = done.stdout.find('{\n "report"')
    assert start >= 0, (
        f"the script ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return {**json.loads(done.stdout[start:]), "status": done.returncode}


def test_every_alias_leads_to_the_same_weight(comparison: dict):
    assert comparison["bad"] == {}
    assert comparison["status"] == 0


@pytest.mark.parametrize("model", LEAST_ALIASES)
def test_enough_was_compared(comparison: dict, model: str):
    assert comparison["report"][model]["aliases"] >= LEAST_ALIASES[model]


def test_families(comparison: dict):
    named = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "sd3.5 medium": "sd3", "flux": "flux", "wan": "wan"}
    assert {model: comparison["report"][model]["family"] for model in named} == named
