"""Makes `oft_core`, `dev` and `embedded` importable from any test.

Only these names are offered, not the repository folder: with that on sys.path, our `nodes` package would
hide ComfyUI's module of that name from the tests that import ComfyUI.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


class _RepoPackages:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(REPO)]) if name in ("oft_core", "dev", "embedded") else None


sys.meta_path.insert(0, _RepoPackages)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that two processes end together: pages in a browser, then those with a server or a training."""

    def place(item: pytest.Item) -> int:
        if item.path.name in ("test_host_page.py", "test_page.py"):
            return 0
        return 1 if item.path.parent.name in ("host", "inhost") else 2

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("OFT_RUFF_FAILED"):
        terminalreporter.write_line(
            "ruff found faults (listed before the tests), so this run fails.", red=True
        )
