"""ComfyUI's page with our nodes, in both node renderers: found by search, placed, run, report readable."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from dev.demo import EXAMPLE_OFT_FILE, STAND_INS, provide_example_files
from dev.host import cache_dir
from dev.oft_files import write_random_oft
from dev.page import NO_BROWSER, ComfyPage, find_browser
from dev.server import ComfyServer
from dev.subjects import CHECKPOINT

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((REPO / "example_workflows").glob("*.json"))
OFT_FILE = "page_test.safetensors"
RENDERERS = pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas-nodes", "nodes-2.0"])

# Errors that the bare page of this ComfyUI version logs by itself.
FRONTEND_FAULTS = (
    r"Failed to load resource.* @ .*(/user\.css|/userdata[/?].*)$",
    r"Cannot read properties of undefined \(reading 'id'\)",
    r"violates the following Content Security Policy directive",
)

pytestmark = pytest.mark.page


def our_faults(page: ComfyPage) -> list[str]:
    """Console errors that the bare page does not have."""
    lines = [f"{text} @ {source}" for text, source in page.errors]
    return [line for line in lines if not any(re.search(known, line, re.DOTALL) for known in FRONTEND_FAULTS)]


@pytest.fixture(scope="module")
def browser() -> None:
    pytest.importorskip("playwright")
    if find_browser() is None:
        # Continuous integration must not pass by having no browser.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_BROWSER)


@pytest.fixture(scope="module")
def files(host: ComfyServer, models: Path) -> None:
    write_random_oft(models / "checkpoints" / "tiny_sd15.safetensors", host.models / "oft" / OFT_FILE, seed=1)
    provide_example_files(host, models)


def save_screenshot(page: ComfyPage, name: str) -> None:
    print("screenshot:", page.screenshot(cache_dir() / "screenshots" / f"{name}.png"))


@RENDERERS
def test_search_place_run_and_read(host: ComfyServer, browser: None, files: None, vue_nodes: bool) -> None:
    with ComfyPage(host.url, vue_nodes=vue_nodes) as page:
        page.clear()
        found = page.search("oft", 480, 160)
        assert {"Load OFT", "Apply OFT"} <= set(found)
        oft = page.choose("Load OFT")

        # The other nodes go around the one that was placed by hand. Strengths differ between the renderers,
        # so that the node really runs in both: a cached node sends no report.
        x, y = page.page.evaluate("(id) => [...app.graph.getNodeById(id).pos]", oft)
        page.set(oft, oft_name=OFT_FILE, strength_model=0.6 if vue_nodes else 0.5)
        checkpoint = page.add("CheckpointLoaderSimple", x - 330, y, ckpt_name="tiny_sd15.safetensors")
        good = page.add("CLIPTextEncode", x + 380, y - 40, text="a red cat")
        bad = page.add("CLIPTextEncode", x + 380, y + 240, text="blurry")
        latent = page.add("EmptyLatentImage", x - 330, y + 220, width=64, height=64)
        sampler = page.add("KSampler", x + 820, y, steps=2, seed=5)
        decode = page.add("VAEDecode", x + 1130, y)
        preview = page.add("PreviewImage", x + 1130, y + 120)
        for source, output, target, name in (
            (checkpoint, 0, oft, "model"),
            (checkpoint, 1, oft, "clip"),
            (oft, 0, sampler, "model"),
            (oft, 1, good, "clip"),
            (oft, 1, bad, "clip"),
            (good, 0, sampler, "positive"),
            (bad, 0, sampler, "negative"),
            (latent, 0, sampler, "latent_image"),
            (sampler, 0, decode, "samples"),
            (checkpoint, 2, decode, "vae"),
            (decode, 0, preview, "images"),
        ):
            page.connect(source, output, target, name)
        entry = page.run()
        page.fit()
        save_screenshot(page, "page-nodes-2.0" if vue_nodes else "page-canvas-nodes")

        assert entry["status"]["status_str"] == "success"
        assert entry["outputs"][str(preview)]["images"]
        report = page.page.get_by_text("LyCORIS Diag-OFT").locator("visible=true")
        assert report.count() == 1, "the report is not visible in the node"
        box = report.bounding_box()
        left, top, right, bottom = page.node_box(oft)
        assert left <= box["x"] and box["x"] + box["width"] <= right + 1
        assert top <= box["y"] and box["y"] + box["height"] <= bottom + 1
        assert our_faults(page) == []
        assert page.refused == []


def opened(page: ComfyPage, example: Path, look: bool = True) -> dict:
    """Open an example as a user does, and set small pictures and few steps, for speed only. The prompt of the page.

    look: for a screenshot, the whole graph in sight.
    """
    page.load_workflow(json.loads(example.read_text(encoding="utf-8")))
    assert page.dialog_texts() == [], "something is missing, says the page"
    if look:
        page.fit()
    for node_id, node in page.prompt().items():
        if node["class_type"].startswith("Empty"):
            page.set(int(node_id), width=64, height=64)
        elif node["class_type"] == "KSampler":
            page.set(int(node_id), steps=2, seed=1)
        elif node["class_type"] == "OFT_Dataset":
            page.set(int(node_id), resolution=64)
        elif node["class_type"] == "OFT_Train":
            page.set(int(node_id), steps=2, sample_prompts="a dog", sample_every=2)
    return page.prompt()


@pytest.mark.skipif(not EXAMPLES, reason="no example workflows")
def test_example_workflows_run_from_the_page(
    host: ComfyServer, browser: None, files: None, subtests: pytest.Subtests
) -> None:
    """Every example runs in the newer nodes; the older ones show it too and would send the same."""
    sent: dict[str, dict] = {}
    with ComfyPage(host.url, vue_nodes=True) as page:
        for example in EXAMPLES:
            with subtests.test(example.stem):
                prompt = sent[example.stem] = opened(page, example)
                names = {v for n in prompt.values() for v in n["inputs"].values() if isinstance(v, str)}
                if not any(n["class_type"] == "OFT_Train" for n in prompt.values()):
                    assert EXAMPLE_OFT_FILE in names, "the example loads no OFT file"
                assert names & {CHECKPOINT, *(Path(name).name for name in STAND_INS)}
                entry = page.run()
                save_screenshot(page, f"{example.stem}-nodes-2.0")
                assert entry["status"]["status_str"] == "success", entry["status"]["messages"][-1]
                assert any(out.get("images") for out in entry["outputs"].values())
        assert our_faults(page) == []
    with ComfyPage(host.url, vue_nodes=False) as page:
        for example in EXAMPLES:
            with subtests.test(example.stem, nodes="canvas"):
                assert opened(page, example, look=False) == sent[example.stem]
        assert our_faults(page) == []
