"""Reading and writing tags."""

from __future__ import annotations

import pytest


@pytest.fixture
def tags(web_of):
    return web_of("forge").pack("webui.tags")


@pytest.mark.parametrize(
    ("text", "te", "unet"),
    [
        ("koala", 1, 1), ("koala:0.8", 0.8, 0.8), ("koala:0.3:0.8", 0.3, 0.8), ("koala:te=0.5", 0.5, 0.5), ("koala:unet=0.5", 1, 0.5),
        ("koala:te=0.5:unet=0.8", 0.5, 0.8), ("koala:0.7:unet=0", 0.7, 0), ("koala: -1 ", -1, -1), ("koala:1e-1", 0.1, 0.1),
    ],
)
def test_numbers(tags, text, te, unet):
    tag = tags.parse(text.split(":"))
    assert (tag.name, tag.te, tag.unet) == ("koala", te, unet)


@pytest.mark.parametrize(
    "text",
    [
        "<oft:koala:0.8>", "<oft:koala:te=0.5:unet=1>", "<oft:koala:1:mode=geodesic:coft=hold>", "<oft:koala:1:coft=12.5>",
        "<oft:koala:1:blocks=all=0, output.3-5=1>", "<oft:my file (v2).x:1>",
    ],
)
def test_a_tag_says_itself_again(tags, text):
    assert str(tags.parse(text[5:-1].split(":"))) == text


def test_presets_of_block_strengths_go_by_their_names(tags):
    tag = tags.parse(["koala", "0.5", "blocks=SDXL", " style (B-LoRA)", "mode=linear"])
    assert tag.blocks == "all=0, output.1=1" and tag.mode == "linear" and tag.unet == 0.5


def test_mentions_come_in_order(tags):
    found = tags.mentions("a <lora:ink:1> b <oft:koala:0.5:te=0> <hypernet:x:1> <oft:dog>", ("oft", "lora"))
    assert [(m.kind, m.items) for m in found] == [("lora", ("ink", "1")), ("oft", ("koala", "0.5", "te=0")), ("oft", ("dog",))]
