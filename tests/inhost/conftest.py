"""Tests inside a ComfyUI that is imported into pytest's own process, once, when the first of these files is collected.

Helpers: `patching` (loading), `turning` (turned activations), `learning` (training).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dev.inprocess import start

HERE = Path(__file__).parent
sys.path.append(str(HERE))
pytest.register_assert_rewrite("patching", "turning", "learning")


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """ComfyUI must be there before a file is imported that uses it."""
    host_dir = os.environ.get("OFT_HOST_DIR")
    if not host_dir:
        pytest.skip("needs a ComfyUI: run `python dev/run.py test`, or set OFT_HOST_DIR to a ComfyUI folder")
    start(Path(host_dir))
