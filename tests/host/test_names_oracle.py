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

# What our own index knows of ComfyUI 0.3.75, where that is all; later versions have more.
LEAST_KNOWN = {
    "sd1": 2641,
    "sd2": 2641,
    "sdxl": 6938,
    "sdxl without middle": 2367,
    "sd3": 2100,
    "sd3.5 large": 4216,
    "sd3.5 medium": 3118,
    "flux": 3100,
    "pixart": 1524,
    "auraflow": 983,
    "z-image": 1554,
    "qwen": 457,
    "ltx": 1114,
    "wan": 190,
    "sd1 text encoders": 317,
    "sd2 text encoders": 628,
    "sdxl text encoders": 963,
    "sd3 text encoders": 1401,
    "flux text encoders": 974,
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


@pytest.mark.parametrize("model", LEAST_KNOWN)
def test_our_own_index_knows_enough(comparison: dict, model: str):
    entry = comparison["report"][model]
    assert entry["aliases"] >= entry["known"] >= LEAST_KNOWN[model]


def test_families(comparison: dict):
    named = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "sd3.5 medium": "sd3", "flux": "flux", "wan": "wan"}
    assert {model: comparison["report"][model]["family"] for model in named} == named
