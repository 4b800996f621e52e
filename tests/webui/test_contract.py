"""One list of what the face touches of a web UI: the stand-ins have it, the face imports nothing else, and a real one has it.

With OFT_WEBUI_DIR the names are looked for in that checkout of a web UI; nothing of it is run.
"""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path

import pytest

from .conftest import HOSTS, REPO, STANDIN

OWN_HOSTS = REPO / "webui" / "hosts"
#: Modules of hosts begin with one of these; networks is the LoRA extension's.
ROOTS = ("modules", "networks", "network", "backend", "ldm_patched", "modules_forge")


def _constant(path: Path, name: str) -> dict:
    """A dictionary that a file holds, without running the file; ``**lists.TOUCHES`` is followed."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if getattr(target, "id", "") == name:
            out = {}
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if key is None:
                    out |= _constant(OWN_HOSTS / f"{value.value.id}.py", value.attr)
                else:
                    out[ast.literal_eval(key)] = ast.literal_eval(value)
            return out
    raise AssertionError(f"{path.name} has no {name}")


def _touched(host: str) -> dict[str, tuple[str, ...]]:
    """module -> names, of what all hosts have and of what this one has."""
    common, own = _constant(OWN_HOSTS / "contract.py", "COMMON"), _constant(OWN_HOSTS / f"{host}.py", "TOUCHES")
    return {module: (*common.get(module, ()), *own.get(module, ())) for module in common | own}


def _imported(path: Path) -> set[tuple[str, str]]:
    """(module, name or "") of all imports from hosts in a file."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] in ROOTS:
            out |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            out |= {(alias.name, "") for alias in node.names if alias.name.partition(".")[0] in ROOTS}
    return out


@pytest.mark.parametrize("host", HOSTS)
def test_the_stand_in_has_every_name(web_of, host):
    web_of(host)
    missing = [
        f"{module}.{name}" for module, names in _touched(host).items() for name in names
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not missing


def test_the_face_imports_nothing_that_is_not_listed():
    listed = {module for host in HOSTS for module in _touched(host)}
    everything = listed | {f"{module}.{name}" for host in HOSTS for module, names in _touched(host).items() for name in names}
    for path in (REPO / "webui").rglob("*.py"):
        for module, name in _imported(path):
            whole = f"{module}.{name}" if name else module
            assert whole in everything or module in listed and not name, f"{path.name}: {whole} is not in the contract"


def _defined(path: Path) -> set[str]:
    """Names that a module has at its top level, and those that it takes over with ``from x import *`` are not known."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            out.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            out |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            out.add(node.id)
    return out


def _host_of(root: Path) -> str:
    """Which web UI a checkout is, by what the face itself looks for."""
    if (root / "modules_forge/packages/comfy/weight_adapter").is_dir():
        return "neo"
    if (root / "backend/patcher/lora.py").is_file():
        return "forge"
    return "reforge" if (root / "ldm_patched/modules/weight_adapter").is_dir() else "a1111"


def _module_file(root: Path, module: str) -> Path:
    parts = module.split(".")
    places = [root, *sorted((root / "extensions-builtin").glob("*ora*"))]
    found = (p for place in places for p in (place.joinpath(*parts).with_suffix(".py"), place.joinpath(*parts, "__init__.py")))
    return next((path for path in found if path.is_file()), root / module)


def faults_of(root: Path) -> list[str]:
    """What a checkout lacks of the contract."""
    out = []
    for module, names in _touched(_host_of(root)).items():
        path = _module_file(root, module)
        if not path.is_file():
            out.append(f"{module}: no such module")
            continue
        out += [f"{module}.{name}" for name in names if name not in _defined(path)]
    return out


def test_a_checkout_without_a_name_is_found_out(tmp_path):
    assert "modules.cache: no such module" in faults_of(tmp_path)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "cache.py").write_text("other = 1\n")
    assert "modules.cache.cached_data_for_file" in faults_of(tmp_path)
    (tmp_path / "modules" / "cache.py").write_text("def cached_data_for_file(): pass\n")
    assert not [fault for fault in faults_of(tmp_path) if fault.startswith("modules.cache")]


if "OFT_WEBUI_DIR" in os.environ:

    def test_a_real_web_ui_has_every_name():
        assert faults_of(Path(os.environ["OFT_WEBUI_DIR"])) == []


def test_every_host_has_a_stand_in():
    assert {path.name for path in STANDIN.iterdir() if path.is_dir()} == {*HOSTS, "common"}
