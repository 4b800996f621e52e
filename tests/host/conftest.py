"""Fixtures for tests against a real ComfyUI.

    host         the session's running server (dev.server.ComfyServer): .url .log .output .models
    client       dev.client.Client for it: client.run(graph) -> Result
    models       folder of the tiny model files that the server lists
    oft_dir      where to put adapter files: listed by our loader at once
    make_server  start a further server with other options: make_server(extra_args=[...])
    pack         our pack and ComfyUI (CPU) imported into this process: pack.nodes, pack.oft_core
    comfy        the `comfy` package of it, for tests of single functions

`python dev/run.py test` sets OFT_HOST_DIR; without it these tests are skipped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dev.client import Client
from dev.host import cache_dir, ensure_models
from dev.inprocess import start
from dev.server import ComfyServer


@pytest.fixture(scope="session")
def host_dir() -> Path:
    """The installed ComfyUI tree."""
    path = os.environ.get("OFT_HOST_DIR")
    if not path:
        pytest.skip("needs a ComfyUI: run `python dev/run.py test`, or set OFT_HOST_DIR to a ComfyUI folder")
    if not (Path(path) / "main.py").is_file():
        pytest.fail(f"OFT_HOST_DIR={path} has no main.py")
    return Path(path)


@pytest.fixture(scope="session")
def models(host_dir: Path) -> Path:
    return ensure_models(sys.executable, host_dir, cache_dir())


@pytest.fixture(scope="session")
def host(host_dir: Path, models: Path, tmp_path_factory: pytest.TempPathFactory):
    with ComfyServer(host_dir, tmp_path_factory.mktemp("comfyui"), models_dir=models) as server:
        yield server


@pytest.fixture(scope="session")
def client(host: ComfyServer) -> Client:
    return host.client()


@pytest.fixture(scope="session")
def oft_dir(host: ComfyServer) -> Path:
    return host.models / "oft"


@pytest.fixture
def make_server(host_dir: Path, models: Path, tmp_path: Path):
    started: list[ComfyServer] = []

    def make(**options: object) -> ComfyServer:
        work = tmp_path / f"comfyui{len(started)}"
        server = ComfyServer(host_dir, work, **{"models_dir": models, **options})
        started.append(server)
        return server.start()

    yield make
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def pack(host_dir: Path) -> ModuleType:
    return start(host_dir)


@pytest.fixture(scope="session")
def comfy(pack: ModuleType) -> ModuleType:
    import comfy
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd

    return comfy
