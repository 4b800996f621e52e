#!/usr/bin/env python3
"""The two commands for a fresh machine that has only Python (3.10 or newer) and git:

    python dev/run.py demo [--serve] [--port N]   draw pictures with an OFT file in a real ComfyUI
    python dev/run.py test [-- PYTEST_ARGS...]    lint, then all tests, also against a real ComfyUI

The first run installs a ComfyUI and test tools into ``.cache`` (set OFT_CACHE for another place); later runs
start at once. Nothing outside that folder is changed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
if TYPE_CHECKING:
    from dev.host import Host


def begin_web_environments(host: Host) -> subprocess.Popen | None:
    """Make what the web UIs' page tests run in, beside the installation of the host: a process, or None where that is done."""
    if (host.cache / "installed.json").exists():
        return None  # not the first run: what is missing is made by the tests
    host.logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.webui.page.environment", str(host.venv)]
    with open(host.logs / "web.log", "wb") as log:
        return subprocess.Popen(command, cwd=REPO, env={**os.environ, "OFT_CACHE": str(host.cache)}, stdout=log, stderr=log)


def run_tests(host: Host, pytest_args: list[str]) -> int:
    """Ruff, then pytest over tests/. Returns the exit status; pytest's summary is the last thing printed."""
    from dev.page import find_browser, install_browser

    print("Checking the code with ruff ...", flush=True)
    ruff = subprocess.call(
        [str(host.python), "-m", "ruff", "check", "--output-format=concise", "."], cwd=REPO
    )
    env = {
        **os.environ,
        "OFT_HOST_DIR": str(host.tree),
        "OFT_CACHE": str(host.cache),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
    }
    env.pop("PYTHONPATH", None)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process compiles all that it imports
    if env.get("CI") and not find_browser():
        print("Installing Chromium for the page tests ...", flush=True)
        install_browser(host.logs / "chromium.log")
    if ruff:
        env["OFT_RUFF_FAILED"] = "1"  # tests/conftest.py repeats it at the end, where it is seen
    command = [str(host.python), "-m", "pytest", "-c", "tests/pytest.ini"]
    # Paths among the arguments choose what runs; without any it is everything.
    if not any(a.startswith("tests") for a in pytest_args):
        command.append("tests")
    if not pytest_args and (os.cpu_count() or 1) > 1:
        # Everything, in two processes (each has a ComfyUI of its own; a third gains nothing on two cores), the order being that
        # of tests/conftest.py. Choices start sooner in one.
        command += ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--durations=20"]
    return subprocess.call([*command, *pytest_args], cwd=REPO, env=env) or ruff


def main(argv: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 (the file must still say so in words on an older Python)
        print("Python 3.10 or newer is needed; this is " + sys.version.split()[0])
        return 2
    parser = argparse.ArgumentParser(prog="run.py", description="Try the OFT pack, or test it.")
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("test", help="lint and run all tests")
    test.add_argument("pytest_args", nargs="*", help="passed to pytest, for example: -- -k names")
    pytest_args: list[str] = []
    if argv[:1] == ["test"] and argv[1:2] not in (["-h"], ["--help"]):
        # Everything else is pytest's, options included; argparse would sort options and words apart.
        argv, pytest_args = argv[:1], [a for a in argv[1:] if a != "--"]
    demo = commands.add_parser("demo", help="draw a sheet of pictures in a real ComfyUI")
    demo.add_argument("--serve", action="store_true", help="keep ComfyUI running until Ctrl-C")
    demo.add_argument("--port", type=int, default=0, help="port of the page (default: any free one)")
    demo.add_argument("--out", type=Path, help="where to put the sheet (default: in the cache folder)")
    options = parser.parse_args(argv)

    from dev.host import Host, InstallError, cache_dir, ensure_models

    try:
        host = Host(cache_dir())
        web = begin_web_environments(host) if options.command == "test" and not pytest_args else None
        host.install()
        models = ensure_models(host.python, host.tree, host.cache, lambda text: print(text, flush=True))
        if options.command == "test":
            if web is not None:
                web.wait()  # a failure is tried again, and reported, by the tests
            return run_tests(host, pytest_args)
    except InstallError as fault:
        print(fault, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to go on.", flush=True)
        return 130
    command = [str(host.python), "-m", "dev.demo", str(host.tree), str(models), str(host.cache)]
    command += ["--port", str(options.port), *(["--serve"] if options.serve else [])]
    command += ["--out", str(options.out.resolve())] if options.out else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    process = subprocess.Popen(command, cwd=REPO, env=env)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the demo got the same Ctrl-C and is stopping its server


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
