"""Environments with the gradio of each web UI, made once and kept in the cache folder.

``python -m tests.webui.page.environment VENV`` makes them all, for tests that will run in the environment VENV.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from dev.host import cache_dir

#: gradio -> what it ran with when it was new; the web UIs pin much the same.
PINS = {
    "3.41.2": (
        "gradio==3.41.2", "fastapi==0.94.0", "starlette==0.26.1", "pydantic==1.10.27", "anyio==3.7.1", "httpx==0.24.1",
        "websockets==11.0.3", "huggingface-hub==0.23.5", "numpy==1.26.4", "Pillow==9.5.0", "pandas==2.2.3", "altair==5.5.0",
        "matplotlib==3.8.4",
    ),
    "4.40.0": (
        "gradio==4.40.0", "fastapi==0.104.1", "starlette==0.27.0", "pydantic==2.8.2", "anyio==3.7.1", "httpx==0.24.1",
        "websockets==12.0", "huggingface-hub==0.25.2", "numpy==1.26.4", "Pillow==9.5.0", "pandas==2.2.3", "matplotlib==3.8.4",
    ),
}


def python_with(gradio: str, tests: str = sys.prefix) -> Path:
    """The Python of the environment with this gradio, with torch and safetensors of the environment ``tests`` behind it.

    Raises RuntimeError with pip's last lines if it cannot be installed.
    """
    pins = PINS[gradio]
    root = cache_dir() / f"gradio-{gradio}"
    python = root / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    # A new Python or other pins make another environment.
    mark, wanted = root / "made.txt", hashlib.sha256(repr((sys.version, tests, pins)).encode()).hexdigest()
    if mark.is_file() and mark.read_text() == wanted:
        return python
    shutil.rmtree(root, ignore_errors=True)
    venv.create(root, with_pip=True)
    command = [str(python), "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", *pins]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"gradio {gradio} cannot be installed: {run.stderr[-2000:]}")
    site = next(root.glob("lib/python*/site-packages"), root / "Lib" / "site-packages")
    inside = ("Lib",) if sys.platform == "win32" else ("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    (site / "behind.pth").write_text(f"{Path(tests, *inside, 'site-packages')}\n")
    mark.write_text(wanted)
    return python


if __name__ == "__main__":
    for version in PINS:
        python_with(version, sys.argv[1])
