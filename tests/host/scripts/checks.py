"""What the scripts beside this file share: ComfyUI and our pack in one process, and checks that report as JSON.

usage of such a script: python SCRIPT HOST_DIR WORK_DIR [check ...]        with the host's Python

Prints one line of JSON a check: {"check": name, "ok": bool, "detail": text}.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
CHECKS: dict[str, object] = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def start_host() -> tuple[str, list[str]]:
    """Import ComfyUI for the CPU, and our pack as ComfyUI would, under a name of its own.

    Returns the working folder and the names of the checks that were asked for.
    """
    host_dir, work_dir, *wanted = sys.argv[1:]
    sys.path[:0] = [host_dir, str(REPO / "dev" / "host_nodes")]
    sys.argv[1:] = []
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = work_dir
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(
        "comfyui_oft", REPO / "__init__.py", submodule_search_locations=[str(REPO)]
    )
    pack = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_oft"] = pack
    spec.loader.exec_module(pack)
    return work_dir, wanted


def run_checks(wanted: list[str]) -> int:
    """Run the checks of these names, or all. Returns the exit status."""
    failed = 0
    for name in wanted or CHECKS:
        try:
            detail, ok = CHECKS[name]() or "", True
        except Exception:  # noqa: BLE001 (a check may fail in any way; the trace is the result)
            detail, ok = traceback.format_exc(), False
        failed += not ok
        print(json.dumps({"check": name, "ok": ok, "detail": detail}), flush=True)
    return 1 if failed else 0
