"""Tab, cards, editor and settings in the gradio of Automatic1111 (3.41.2) and of Forge (4.40), in Chromium."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dev.host import cache_dir
from dev.oft_files import write_random_oft
from dev.page import NO_BROWSER, Window, find_browser
from oft_core import Strength, load_adapter

from .environment import PINS, python_with

APP = Path(__file__).with_name("app.py")
HOSTILE = '<img src=x onerror="window.hacked=1">'

pytestmark = pytest.mark.page


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _checkpoint(path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    block = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1."
    save_file({f"{block}{name}.weight": torch.randn(32, 32, generator=random) for name in ("to_q", "to_k", "to_v")}, path)


class App:
    """The page of `app.py` in one gradio, and a browser on it."""

    def __init__(self, gradio: str, folder: Path):
        self.gradio, self.folder, self.port = gradio, folder, _free_port()
        self.ofts = folder / "models" / "OFT"
        self.checkpoints = folder / "models" / "Stable-diffusion"
        for path in (self.ofts, folder / "models" / "Lora", self.checkpoints):
            path.mkdir(parents=True)
        base = self.checkpoints / "base.safetensors"
        _checkpoint(base)
        write_random_oft(base, self.ofts / "koala.safetensors", block_size=8, layers="attn")
        with safe_open(self.ofts / "koala.safetensors", "pt") as file:
            self.tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        evil = {"trigger": HOSTILE, "ss_output_name": HOSTILE, "ss_base_model_version": HOSTILE}
        save_file(self.tensors, self.ofts / "evil '&quot;.safetensors", evil)
        (self.ofts / "evil '&quot;.txt").write_text(HOSTILE)
        save_file(self.tensors, self.ofts / "dog.safetensors", {"trigger": "sks dog"})

    def start(self) -> None:
        env = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        env.pop("PYTHONPATH", None)
        self.log = open(self.folder / "log.txt", "w+", encoding="utf-8")  # noqa: SIM115
        command = [str(python_with(self.gradio)), str(APP), str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=env, cwd=self.folder)
        until = time.monotonic() + 180
        while time.monotonic() < until and self.process.poll() is None:
            if "ready" in (self.folder / "log.txt").read_text():
                return
            time.sleep(0.2)
        self.stop()
        pytest.fail(f"gradio {self.gradio} did not start:\n{(self.folder / 'log.txt').read_text()[-3000:]}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def api(self, path: str, method: str = "GET"):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(self.url + path, method=method), timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module", params=list(PINS))
def app(request, tmp_path_factory):
    pytest.importorskip("playwright")
    if find_browser() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_BROWSER)
    made = App(request.param, tmp_path_factory.mktemp(f"gradio{request.param[0]}"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def page(app):
    with Window(app.url, size=(1280, 900)) as window:
        page = window.page
        page.wait_for_selector("#cards .card")
        yield page


def _shoot(page, app, name: str) -> None:
    path = cache_dir() / "screenshots" / f"webui_{app.gradio[0]}_{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(path), full_page=True)


def _tab(page, name: str) -> None:
    page.locator(".tab-nav button, button[role=tab]").filter(has_text=re.compile(rf"^\s*{name}\s*$")).first.click()


def _text(page, name: str):
    return page.locator(f"#{name} textarea, #{name} input").first


def _wait(page, name: str, part: str) -> str:
    page.wait_for_function(
        "([name, part]) => (document.querySelector(`#${name} textarea`) || {value: ''}).value.includes(part)", arg=[name, part], timeout=60_000
    )
    return _text(page, name).input_value()


def test_a_click_on_a_card_writes_the_tag_and_the_trigger(page, app):
    _shoot(page, app, "cards")
    cards = page.locator("#cards .card")
    assert cards.count() == 3
    cards.filter(has_text="koala").click()
    cards.filter(has_text="dog").click()
    assert page.evaluate("window.clicked") == [["<oft:koala:1>", ""], ["<oft:dog:1> sks dog", ""]]


def test_names_and_metadata_are_text(page, app):
    page.locator("#cards .card").filter(has_text="evil").click()
    assert page.evaluate("window.clicked.pop()")[0] == f"<oft:evil '&quot;:1> {HOSTILE}"
    _text(page, "txt2img_oft_edit_user_metadata_name").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", "evil '&quot;")
    page.locator("#txt2img_oft_edit_user_metadata_button").click()
    page.wait_for_selector("td:has-text('onerror')")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#cards img, table img").count() == 0


def test_what_a_user_writes_stays_beside_the_file(page, app):
    def choose(name):
        box = _text(page, "txt2img_oft_edit_user_metadata_name")
        box.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", name)
        page.locator("#txt2img_oft_edit_user_metadata_button").click()

    choose("koala")
    page.wait_for_selector("td:has-text('koala.safetensors')")
    page.get_by_label("Activation text").fill("a koala, gum tree")
    page.get_by_label("Negative prompt").fill("bear")
    page.locator("input[type=number]").first.fill("0.75")
    page.locator("input[type=number]").first.blur()
    page.locator("#txt2img_oft_edit_user_metadata_save").click()
    beside = app.ofts / "koala.json"
    until = time.monotonic() + 20
    while not beside.exists() and time.monotonic() < until:
        page.wait_for_timeout(100)
    said = json.loads(beside.read_text())
    assert said["activation text"] == "a koala, gum tree" and said["preferred weight"] == 0.75 and said["negative text"] == "bear"
    page.locator("#cards_refresh").click()
    page.wait_for_function("document.querySelector('#cards').innerHTML.includes('gum tree')")
    page.locator("#cards .card").filter(has_text="koala").click()
    assert page.evaluate("window.clicked.pop()") == ["<oft:koala:0.75> a koala, gum tree", "bear"]
    beside.unlink()


def test_settings_are_there(page, app):
    _tab(page, "Settings")
    page.wait_for_selector("#setting_oft_mode")
    _shoot(page, app, "settings")
    assert page.locator("#setting_oft_mode input[type=radio]").count() == 4
    assert _text(page, "setting_oft_coft").input_value() == "file"


def test_inspect(page, app):
    _tab(page, "OFT")
    page.locator("#oft_inspect_go").click()
    report = _wait(page, "oft_inspect_report", "Largest angle")
    assert "LyCORIS Diag-OFT" in report
    page.wait_for_selector("#oft_inspect_picture img", timeout=60_000)
    assert page.evaluate("document.querySelector('#oft_inspect_picture img').naturalWidth") == 1200
    _shoot(page, app, "inspect")


def test_the_last_picture_of_nobody(page, app):
    _tab(page, "OFT")
    _tab(page, "Last picture")
    page.locator("#oft_last_go").click()
    _wait(page, "oft_last_report", "No picture has been drawn")


def test_the_training_says_what_is_missing(page, app):
    _tab(page, "OFT")
    _tab(page, "Train")
    _text(page, "oft_train_folder").fill(str(app.checkpoints / "nowhere"))
    page.locator("#oft_train_go").click()
    _wait(page, "oft_train_status", "There is no such folder of pictures")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(app.checkpoints / "picture.png")
    _text(page, "oft_train_folder").fill(str(app.checkpoints))
    page.locator("#oft_train_go").click()
    _wait(page, "oft_train_status", "There is no model to train")
    _shoot(page, app, "train")
    (app.checkpoints / "picture.png").unlink()


def test_merge_and_what_cannot_be(page, app):
    _tab(page, "OFT")
    _tab(page, "Merge")
    _text(page, "oft_merge_name").fill("merged")
    page.locator("#oft_merge_go").click()
    text = _wait(page, "oft_merge_result", "merged.safetensors")
    assert "3 of 3 layers merged" in text
    assert page.evaluate("window.progressAsked") is True
    _shoot(page, app, "merge")
    with safe_open(app.checkpoints / "merged.safetensors", "pt") as new, safe_open(app.checkpoints / "base.safetensors", "pt") as old:
        for key in old.keys():  # noqa: SIM118
            before, after = old.get_tensor(key), new.get_tensor(key)
            assert not torch.equal(before, after)
            assert torch.allclose(before.norm(dim=0), after.norm(dim=0), rtol=1e-4), "turned, not stretched"
    page.locator("#oft_merge_go").click()
    _wait(page, "oft_merge_result", "There is a file of this name already")
    _text(page, "oft_merge_name").fill("../outside")
    page.locator("#oft_merge_go").click()
    _wait(page, "oft_merge_result", "This is no name for a new file")
    _text(page, "oft_merge_name").fill("other")
    _text(page, "oft_merge_blocks").fill("nowhere=1")
    page.locator("#oft_merge_go").click()
    _wait(page, "oft_merge_result", "Unknown block name")
    assert {p.name for p in app.checkpoints.iterdir()} == {"base.safetensors", "merged.safetensors"}
    (app.checkpoints / "merged.safetensors").unlink()


def test_convert(page, app):
    _tab(page, "OFT")
    _tab(page, "Convert")
    page.locator("#oft_convert_go").click()
    # OFT v2 turns what goes into a layer, this file what comes out.
    _wait(page, "oft_convert_result", "it turns the output side")
    box = page.locator("#oft_convert_dialect input").first
    box.click()
    box.fill("kohya")
    box.press("Enter")
    page.locator("#oft_convert_go").click()
    text = _wait(page, "oft_convert_result", "Saved: ")
    _shoot(page, app, "convert")
    made = app.ofts / text.partition("Saved: ")[2].partition("\n")[0]
    turned = [load_adapter(path).operations() for path in (app.ofts / "dog.safetensors", made)]
    assert len(turned[0]) == len(turned[1]) == 3
    for one, other in zip(*(pieces.values() for pieces in turned), strict=True):
        a, b = (pieces[0].op.build(Strength()).matrices for pieces in (one, other))
        assert torch.allclose(a, b, atol=1e-6)
    made.unlink()


def test_what_programs_can_ask(app):
    found = {one["name"]: one for one in app.api("/sdapi/v1/refresh-ofts", "POST")}
    assert set(found) == {"koala", "dog", "evil '&quot;"}
    assert found["dog"]["trigger_words"] == ["sks dog"] and len(found["dog"]["hash"]) == 64
    assert app.api("/sdapi/v1/ofts") == list(found.values())
    assert app.api("/sdapi/v1/oft-report") == []
