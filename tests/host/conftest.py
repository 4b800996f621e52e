"""Fixtures for tests against a real ComfyUI.

    host         the session's running server (dev.server.ComfyServer): .url .log .output .models
    client       dev.client.Client for it: client.run(graph) -> Result
    models       folder of the tiny model files that the server lists
    oft_dir      where to put adapter files: listed by our loader at once
    make_server  start a further server with other options: make_server(extra_args=[...])
    comfy        ComfyUI imported into this process (CPU), for tests of single functions
    pack         our pack imported into this process as ComfyUI would: pack.nodes, pack.oft_core

`python dev/run.py test` sets OFT_HOST_DIR; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dev.client import Client
from dev.host import cache_dir, ensure_models
from dev.server import ComfyServer

REPO = Path(__file__).resolve().parents[2]


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
def comfy(host_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The `comfy` package on CPU. Its folders are in a temporary place, and no server is created."""
    sys.path.insert(0, str(host_dir))
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(tmp_path_factory.mktemp("comfy"))
    import comfy
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd

    return comfy


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> ModuleType:
    name = "comfyui_oft_under_test"
    spec = importlib.util.spec_from_file_location(
        name, REPO / "__init__.py", submodule_search_locations=[str(REPO)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
