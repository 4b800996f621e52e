"""Files as prompts name them: folders, short names, PEFT folders, aliases, hashes; and the door."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from .conftest import REPO, close


@pytest.fixture
def web(web_of):
    return web_of("forge")


def test_the_folders(web, tmp_path):
    files, shared = web.pack("webui.files"), web.modules.shared
    assert files.folders() == [str(web.folder), str(web.loras)]
    shared.opts.data["oft_folders"] = f"{tmp_path / 'more'}\n\n {web.loras} "
    assert files.folders() == [str(web.folder), str(tmp_path / "more"), str(web.loras)]
    shared.cmd_opts.oft_dir = str(tmp_path / "elsewhere")
    assert files.folders()[0] == str(tmp_path / "elsewhere")


def test_the_command_line_option():
    spec = importlib.util.spec_from_file_location("preload", REPO / "preload.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import argparse

    parser = argparse.ArgumentParser()
    module.preload(parser)
    assert parser.parse_args(["--oft-dir", "x"]).oft_dir == "x" and parser.parse_args([]).oft_dir is None


def test_only_oft_files_are_listed(web):
    path = web.oft("koala")
    save_file({"lora_unet_x.lora_up.weight": load_file(path).popitem()[1]}, web.loras / "ink.safetensors")
    shutil.copy(path, web.loras / "other.safetensors")
    (web.folder / "notes.txt").write_text("not a model")
    assert [f.name for f in web.pack("webui.files").all_files()] == ["koala", "other"]


def test_names(web):
    files = web.pack("webui.files")
    path = web.oft("koala")
    for folder in ("animals", "animals/cats"):
        (web.folder / folder).mkdir()
        shutil.copy(path, web.folder / folder / "koala.safetensors")
    tensors, peft = load_file(path), web.folder / "my peft"
    peft.mkdir()
    save_file(tensors, peft / "adapter_model.safetensors")
    save_file(tensors, web.folder / "v1.5.safetensors", {"ss_output_name": "tiger"})
    assert [f.name for f in files.refresh().values()] == ["koala", "v1.5", "animals/koala", "animals/cats/koala", "my peft"]
    for said, name in (
        ("koala", "koala"), ("Koala", "koala"), ("animals\\koala", "animals/koala"), ("cats/koala", "animals/cats/koala"),
        ("v1.5", "v1.5"), ("tiger", "v1.5"), ("My PEFT", "my peft"), ("koala.safetensors", "koala"),
    ):
        assert files.find(said).name == name, said


def test_names_that_lead_out_of_the_folders_mean_nothing(web, tmp_path):
    shutil.copy(web.oft("koala"), tmp_path / "secret.safetensors")
    for name in ("../secret", str(tmp_path / "secret.safetensors"), "..\\..\\secret"):
        with pytest.raises(Exception, match="no OFT file of this name"):
            web.pack("webui.files").find(name)


def test_hashes_are_of_the_tensors(web):
    path = web.oft("koala")
    raw = path.read_bytes()
    expected = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    file = web.pack("webui.files").find("koala")
    assert file.sha256 == expected and file.shorthash == expected[:12]
    assert web.pack("webui.files").by_hash(expected[:12]) == file
    assert web.pack("webui.files").by_hash("") is None


def test_pasted_parameters_find_a_file_under_its_new_name(web):
    old = web.oft("koala")
    _, p = web.picture("<oft:koala:0.8>")
    line = p.extra_generation_params["OFT hashes"]
    old.rename(web.folder / "bear.safetensors")
    web.pack("webui.files").refresh()
    params = {"Prompt": "a photo <oft:koala:0.8> <oft:other:1>", "Hires prompt": "<oft:koala>", "OFT hashes": line}
    web.modules.script_callbacks.run("infotext_pasted", "", params)
    assert params["Prompt"] == "a photo <oft:bear:0.8> <oft:other:1>" and params["Hires prompt"] == "<oft:bear>"
    untouched = {"Prompt": "<oft:koala:0.8>"}
    web.modules.script_callbacks.run("infotext_pasted", "", untouched)
    assert untouched == {"Prompt": "<oft:koala:0.8>"}


def test_the_hosts_own_json_beside_a_file_is_no_peft_config(web):
    path = web.oft("koala")
    path.with_suffix(".json").write_text(json.dumps({"activation text": "x"}))
    assert close(web.drawn("<oft:koala:1>"), web.merged((path,)))


def test_reloading_the_page_registers_once_more_and_keeps_the_package(web):
    callbacks = web.modules.script_callbacks
    before, known = web.pack("webui.files"), {kind: len(found) for kind, found in callbacks.registered.items()}
    callbacks.clear_callbacks()
    web.start()
    assert {kind: len(found) for kind, found in callbacks.registered.items()} == known
    assert web.pack("webui.files") is before


def test_an_update_is_taken_in_by_reloading_the_page(web):
    before = web.pack("webui.files")
    sys.modules["oft_pack"].newest -= 1
    web.start()
    assert web.pack("webui.files") is not before


def test_neither_face_imports_the_other(tmp_path):
    """In a fresh process: all of the web UI's face on the stand-in, and no module of ComfyUI or of our nodes."""
    code = f"""
import sys
sys.path[:0] = [{str(REPO / 'tests/webui/standin/common')!r}, {str(REPO / 'tests/webui/standin/forge')!r}, {str(REPO)!r}]
import importlib.util
spec = importlib.util.spec_from_file_location("oft.py", {str(REPO / 'scripts/oft.py')!r})
door = importlib.util.module_from_spec(spec)
spec.loader.exec_module(door)
import oft_pack.webui.hosts as hosts
print(hosts.current().title)
bad = [n for n in sys.modules if n.partition('.')[0] in ('comfy', 'comfy_api', 'folder_paths', 'nodes') or '.nodes' in n]
assert not bad, bad
assert sys.modules['oft_pack'].__spec__.loader is None
"""
    out = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert out.stdout.strip() == "Forge", out.stderr
