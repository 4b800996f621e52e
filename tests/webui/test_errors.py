"""What did not act is said below the picture and stands in its parameters; nothing of it changes the model."""

from __future__ import annotations

import contextlib

import pytest
from safetensors.torch import load_file, save_file

from .conftest import close, equal


def _said(web, prompt):
    """(drawn equals the base, comments, what the parameters say did not act)"""
    base = web.drawn("a photo")
    (found,), p = web.picture(prompt)
    return equal(found, base), " ".join(p.comments), p.extra_generation_params.get("OFT not applied", "")


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("<oft:koalla:1>", "similar names: koala"),
        ("<oft:koala:[0:1:0.5]>", "stays the same for all steps"),
        ("<oft:koala:[0.2:0.8:5]>", "[from:to:when] is for words of the prompt"),
        ("<oft:koala:strong>", "not a number"),
        ("<oft:koala:nan>", "not a number"),
        ("<oft:koala:mode=twist>", "rotation or geodesic or linear or core"),
        ("<oft:koala:coft=400>", "COFT"),
        ("<oft:koala:strength=1>", "one of te, unet, mode, coft, blocks"),
        ("<oft:koala:te=1:te=2>", "says the same thing twice"),
        ("<oft:koala:1:2:3>", "too many numbers"),
        ("<oft:koala:blocks=nowhere=1>", "Unknown block name"),
        ("<oft:koala:blocks=double=1>", "no such block"),
        ("<oft: :1>", "names no file"),
        ("<oft:broken:1>", "damaged or not a safetensors file"),
        ("<oft:lora:1>", "not an OFT file but"),
        ("<oft:nan:1>", "not finite"),
        ("<oft:flux:1>", "belongs to this model"),
        ("<oft:wide:1>", "wide"),
    ],
)
def test_a_tag_that_cannot_act_says_why(web_of, tag, why):
    web = web_of("forge")
    path = web.oft("koala")
    tensors = load_file(path)
    (web.folder / "broken.safetensors").write_bytes(path.read_bytes()[:400])
    random = {"lora_unet_x.lora_up.weight": tensors.popitem()[1].flatten()[:4].reshape(2, 2)}
    random["lora_unet_x.lora_down.weight"] = random["lora_unet_x.lora_up.weight"].clone()
    save_file(random, web.folder / "lora.safetensors")
    bad = {k: v.clone() for k, v in load_file(path).items()}
    next(v for v in bad.values() if v.ndim == 3)[0, 0, 1] = float("nan")
    save_file(bad, web.folder / "nan.safetensors")
    blocks = next(v for v in load_file(path).values() if v.ndim == 3)
    save_file({"lora_unet_double_blocks_0_img_attn_proj.oft_blocks": blocks}, web.folder / "flux.safetensors")
    wide = {k: (v.repeat(3, 1, 1) if v.ndim == 3 else v) for k, v in load_file(path).items()}
    save_file(wide, web.folder / "wide.safetensors")
    same, comments, idle = _said(web, f"a photo {tag}")
    assert same, "nothing of it acts"
    assert why in comments, comments
    assert idle == tag


def test_the_others_act_all_the_same(web):
    path = web.oft("koala")
    (found,), p = web.picture("<oft:nothing:1> <oft:koala:1> <oft:koala:oops>")
    assert close(found, web.merged((path,)))
    assert p.extra_generation_params["OFT not applied"] == "<oft:nothing:1> <oft:koala:oops>"
    assert p.extra_generation_params["OFT hashes"].startswith("koala: ")
    assert len(p.comments) == 2


def test_a_name_with_characters_that_lists_use(web_of):
    web = web_of("forge")
    path = web.oft('ko,ala "x"')
    (found,), p = web.picture('<oft:ko,ala "x":1>')
    assert close(found, web.merged((path,)))
    assert p.extra_generation_params["OFT hashes"].startswith('koala "x": ')


def test_a_file_that_goes_away(web):
    web.oft("koala")
    base = web.drawn("a photo")
    web.drawn("<oft:koala:1>")
    (web.folder / "koala.safetensors").unlink()
    (found,), p = web.picture("<oft:koala:1>")
    assert equal(found, base)
    assert "no OFT file of this name" in " ".join(p.comments)


def test_reports_stay_for_the_tab(web_of):
    web = web_of("forge")
    web.oft("koala")
    web.picture("<oft:koala:0.5><oft:nothing:1>")
    applied, failed = web.pack("webui.activation").last
    assert applied.applied and "Strength 0.5" in applied.text and "Largest angle" in applied.text
    assert applied.tag == "<oft:koala:0.5>"
    assert not failed.applied and failed.tag == "<oft:nothing:1>"
    web.modules.shared.opts.data["oft_report_below"] = True
    _, p = web.picture("<oft:koala:0.5>")
    assert applied.text in p.comments


def test_an_error_of_ours_is_said_and_leaves_the_base(web_of, monkeypatch):
    """The host prints errors of extensions and goes on drawing: the picture must say that nothing acted."""
    web = web_of("forge")
    web.oft("koala")
    base = web.drawn("a photo")
    web.drawn("<oft:koala:1>")

    def broken(*args):
        raise RuntimeError("Expected out tensor to have dtype x")

    activation = web.pack("webui.activation")
    activate = activation.activate

    def as_the_host_calls_it(p, data):
        with contextlib.suppress(RuntimeError):
            activate(p, data)

    monkeypatch.setattr(activation, "place", broken)
    monkeypatch.setattr(activation, "activate", as_the_host_calls_it)
    activation._placed.clear()
    (found,), p = web.picture("<oft:koala:1>")
    assert equal(found, base)
    assert any("nothing was applied" in text and "Expected out tensor" in text for text in p.comments)
