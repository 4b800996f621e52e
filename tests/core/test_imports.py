"""Which module imports which: the layers of CONTRIBUTING.md, and no module that imports itself by way of others."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
#: Folder -> what of this repository it may not import.
LAYERS = {
    "oft_core": ("nodes", "webui", "scripts", "dev", "benchmarks", "embedded"),
    "nodes/binding": ("nodes/training", "nodes/*", "webui", "scripts", "dev", "benchmarks"),
    "nodes/training": ("nodes/*", "webui", "scripts", "dev", "benchmarks"),
    "nodes": ("webui", "scripts", "dev", "benchmarks"),
    "webui": ("nodes", "dev", "benchmarks"),
}


def module_at(place: Path, name: str) -> Path | None:
    """The file of a module called `name` as seen from a folder."""
    path = place.joinpath(*name.split(".")) if name else place
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def imported(file: Path) -> set[Path]:
    """Files of this repository that one imports anywhere but for its types only."""
    out = set()
    tree = ast.parse(file.read_text("utf-8"))
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    left_out = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            places, names = [REPO, file.parent], [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            places = [file.parents[node.level - 1]] if node.level else [REPO, file.parent]
            base = node.module or ""
            # Of `from . import x` the module is x; of `from .x import y` it is x.y if there is one.
            names = [f"{base}.{a.name}".lstrip(".") for a in node.names]
            names = [n if any(module_at(p, n) for p in places) else base for n in names]
        else:
            continue
        out |= {f for n in names for p in places if (f := module_at(p, n))}
    return out - {file}


def files(folder: str) -> list[Path]:
    return sorted((REPO / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ["oft_core", "nodes", "webui", "benchmarks"])
def test_nothing_imports_itself_by_way_of_others(folder):
    graph = {f: {i for i in imported(f) if i.name != "__init__.py"} for f in files(folder) if f.name != "__init__.py"}
    assert sum(map(len, graph.values())) > 10, "the imports were not found"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(str(p.relative_to(REPO)) for p in reversed(error.args[1])))


@pytest.mark.parametrize("folder", LAYERS)
def test_each_layer_knows_only_those_before_it(folder):
    def is_in(file: Path, what: str) -> bool:
        return file.parent == REPO / what[:-2] if what.endswith("/*") else (REPO / what) in file.parents

    wrong = [
        f"{f.relative_to(REPO)} imports {i.relative_to(REPO)}"
        for f in files(folder) for i in sorted(imported(f)) for what in LAYERS[folder] if is_in(i, what)
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ["oft_core"])
def test_the_library_imports_no_host(folder):
    hosts = {"comfy", "comfy_api", "folder_paths", "modules", "gradio", "server"}
    for file in files(folder):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(
                node, ast.ImportFrom) and not node.level else []
            assert not hosts & {n.split(".")[0] for n in names}, file
