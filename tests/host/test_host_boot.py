"""The pack inside a real ComfyUI: it loads, its nodes are registered, its files are served."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dev.client import Client, Graph, PromptFailed, PromptRejected
from dev.server import PACK_FOLDER, ComfyServer
from dev.workflows import FAMILIES, stock_parts, text_to_image, tiny_parts

REPO = Path(__file__).resolve().parents[2]
# Kinds of inputs that have a widget -> what its value is.
VALUES = {"INT": (int,), "FLOAT": (int, float), "BOOLEAN": (bool,), "STRING": (str,), "COMBO": (str,)}
OUR_NODE_FILES = sorted((REPO / "nodes").glob("*.py"))


def our_node_ids() -> set[str]:
    """Node ids as the source states them, so that a node lost on the way to the server is noticed."""
    return {
        i for f in OUR_NODE_FILES for i in re.findall(r'node_id="([^"]+)"', f.read_text(encoding="utf-8"))
    }


def test_nothing_failed_to_import(host: ComfyServer) -> None:
    log = host.log_text()
    assert "IMPORT FAILED" not in log
    assert "Error while calling comfy_entrypoint" not in log
    assert re.search(rf"seconds: .*{PACK_FOLDER}", log), "the pack is not among the imported custom nodes"


def test_our_nodes_are_registered(client: Client) -> None:
    info = client.object_info()
    expected = our_node_ids()
    assert "OFT_Load" in expected
    assert expected <= set(info)
    for node_id in expected:
        entry = info[node_id]
        assert entry["display_name"] and entry["description"], node_id
        assert entry["category"].lower().startswith(("oft", "loaders", "model_patches", "advanced")), node_id
        assert PACK_FOLDER in entry["python_module"]


def test_every_input_and_output_is_explained(client: Client) -> None:
    for node_id in our_node_ids():
        entry = client.object_info(node_id)
        for group in ("required", "optional"):
            for name, spec in entry["input"].get(group, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{node_id}.{name} has no tooltip"
        assert all(entry.get("output_tooltips") or [None] * len(entry["output"])), node_id


def test_web_files_are_served(client: Client) -> None:
    files = [f for f in (REPO / "web").rglob("*") if f.is_file()]
    for file in files:
        path = f"/extensions/{PACK_FOLDER}/{file.relative_to(REPO / 'web').as_posix()}"
        status, body = client.fetch(path)
        assert (status, body) == (200, file.read_bytes()), path
    listed = client.json("/extensions")
    for script in (f for f in files if f.suffix == ".js"):
        assert f"/extensions/{PACK_FOLDER}/{script.relative_to(REPO / 'web').as_posix()}" in listed


def test_every_node_has_a_help_page(client: Client) -> None:
    for node_id in our_node_ids():
        found = [p for p in (f"{node_id}.md", f"{node_id}/en.md") if (REPO / "web" / "docs" / p).is_file()]
        assert found, f"no help page for {node_id}"
        status, body = client.fetch(f"/extensions/{PACK_FOLDER}/docs/{found[0]}")
        assert status == 200 and body.strip()


def test_translations_are_served(client: Client) -> None:
    merged = client.json("/i18n")
    for file in (REPO / "locales").glob("*/nodeDefs.json"):
        ours = json.loads(file.read_text(encoding="utf-8"))
        served = merged[file.parent.name]["nodeDefs"]
        for node_id, texts in ours.items():
            assert served[node_id] == texts, f"{file.parent.name}: {node_id}"


def test_example_workflows_are_in_the_menu(client: Client) -> None:
    names = sorted(f.stem for f in (REPO / "example_workflows").glob("*.json"))
    assert sorted(client.json("/workflow_templates").get(PACK_FOLDER, [])) == names


def test_example_workflows_have_a_value_for_every_input(client: Client) -> None:
    """Values of a saved graph belong to inputs by their order alone."""
    info = client.object_info()
    for file in (REPO / "example_workflows").glob("*.json"):
        for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] not in info:  # notes, which only the page knows
                assert node["type"] == "MarkdownNote", node["type"]
                continue
            specs = []
            for group in info[node["type"]]["input"].values():
                for kind, *options in group.values():
                    own = options[0] if options else {}
                    kind = "COMBO" if isinstance(kind, list) else kind
                    if kind in VALUES and not own.get("forceInput"):
                        specs.append((kind, own))
                        if own.get("control_after_generate"):
                            specs.append(("COMBO", {}))
            values = node.get("widgets_values") or []
            where = f"{file.name}, node {node['id']}: {node['type']} {values}"
            assert len(values) == len(specs), where
            for value, (kind, own) in zip(values, specs, strict=True):
                assert type(value) in VALUES[kind], (where, value)
                if kind in ("INT", "FLOAT"):
                    assert own.get("min", value) <= value <= own.get("max", value), (where, value)


# --- the harness itself ---


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_make_pictures(client: Client, family: str) -> None:
    g = Graph()
    preview = text_to_image(g, tiny_parts(g, family), family)
    picture = client.run(g).image(preview)
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 5, "a flat picture hides every difference"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "flux"])
def test_stock_loaders_accept_the_tiny_files(client: Client, family: str) -> None:
    g = Graph()
    preview = text_to_image(g, stock_parts(g, family), family)
    assert client.run(g).image(preview).std() > 5


def test_the_same_graph_gives_the_same_pixels(client: Client) -> None:
    pictures = []
    for _ in range(2):
        client.free()
        g = Graph()
        preview = text_to_image(g, tiny_parts(g, "sd15"), "sd15", seed=3)
        pictures.append(client.run(g).image(preview))
    assert (pictures[0] == pictures[1]).all()


def test_faults_are_reported_as_such(client: Client) -> None:
    g = Graph()
    g.KSampler(seed=1)
    with pytest.raises(PromptRejected) as rejected:
        client.run(g)
    assert rejected.value.error
    g = Graph()
    model = g.Tiny_Checkpoint(family="sd3", full_depth=True, layers=3, seed=0)  # has no full-depth form
    node = g.Tiny_SaveWeights(pattern=".*", filename="none", model=model)
    with pytest.raises(PromptFailed) as failed:
        client.run(g)
    assert failed.value.node_type == "Tiny_Checkpoint" and "full-depth" in failed.value.text
    assert client.run(g, check=False).of(node) == {}
