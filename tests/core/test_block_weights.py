"""Strengths by block: the text, the places of real layer names, and what they do to a merged file."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from oft_core import BlockError, BlockWeights, NameIndex, Strength, load_adapter, merge_file
from oft_core.block_weights import KINDS, PLACES, PRESETS, Address, address, counted, described, factors
from oft_core.cli import main
from oft_core.merge import METADATA_KEY


def at(place: str, number: int | None = None, *kinds: str) -> Address:
    return Address(place, number, frozenset(kinds))


# --- the text -----------------------------------------------------------------------------------------------


def test_the_last_rule_that_matches_decides() -> None:
    w = BlockWeights.parse("all=0, output.3-5=1, output.4/attention=0.25 ff=-2")
    assert w.factor(at("input", 4, "attention")) == 0
    assert w.factor(at("output", 3, "attention")) == 1
    assert w.factor(at("output", 4, "attention", "self")) == 0.25
    assert w.factor(at("output", 4, "conv")) == 1
    assert w.factor(at("output", 4, "ff")) == -2
    assert w.factor(at("output", 6)) == w.factor(at("other")) == 0
    assert BlockWeights.parse("").factor(at("input", 1)) == 1
    assert BlockWeights.parse("output=0.5").factor(at("input", 1)) == 1


def test_text_encoders_together_and_apart() -> None:
    w = BlockWeights.parse("te=0.5, te2.0-3=0, te3/ff=2")
    assert [w.factor(at(f"te{i}", 2, "ff")) for i in (1, 2, 3)] == [0.5, 0, 2]
    assert w.factor(at("te2", 4)) == 0.5 and w.factor(at("block", 2, "ff")) == 1


def test_number_lists() -> None:
    w = BlockWeights.parse("double.1+4-6+9=0")
    assert [n for n in range(12) if w.factor(at("double", n)) == 0] == [1, 4, 5, 6, 9]
    assert w.factor(at("single", 4)) == 1
    assert BlockWeights.parse("te1.0=0").factor(at("te1")) == 1, "a text encoder's embeddings are in no layer"


SAME = "all=0, output.3-5=1, middle/attention=-0.5, te1.0+2=1.25"


@pytest.mark.parametrize(
    "text",
    [
        SAME,
        "all=0 output.3-5=1 middle/attention=-0.5 te1.0+2=1.25",
        "ALL = 0\n output.3-5 : 1;\tmiddle / attention=-.5\r\nte1.0+2=1.25\n",
        "all＝０，output.3–5＝1、middle／attention=−0.5；te1.0+2=1.250",
        "\u00a0all=0,,output.3\u20115=1 , middle/attention=-5e-1,te1.0+2=1.25,",
    ],
)
def test_text_survives_copy_and_paste(text: str) -> None:
    w = BlockWeights.parse(text)
    assert str(w) == SAME
    assert BlockWeights.parse(str(w)) == w


def test_any_text_comes_back_the_same() -> None:
    draw = random.Random(0)
    for _ in range(300):
        rules = []
        for _ in range(draw.randint(0, 6)):
            place = draw.choice([p for p in PLACES if p != "other"])
            number = draw.choice(["", f".{draw.randint(0, 60)}", f".{draw.randint(0, 9)}-{draw.randint(10, 30)}+40"])
            kind = draw.choice(["", f"/{draw.choice(KINDS)}"])
            rules.append(f"{draw.choice(['all', 'ff', 'other', place + number + kind])}={draw.choice([0, 1, -0.5, 1.25, 0.123456789])}")
        text = ", ".join(rules)
        assert str(BlockWeights.parse(text)) == text


@pytest.mark.parametrize("name", ["outpt", "encoder.3", "input/atention", "te4", "other.3", "attention.2", "all.3"])
def test_unknown_names_are_errors_that_list_the_known_ones(name: str) -> None:
    with pytest.raises(BlockError) as error:
        BlockWeights.parse(f"all=0, {name}=1")
    text = str(error.value)
    assert "Unknown" in text and all(known in text for known in ("all", *PLACES, *KINDS))


@pytest.mark.parametrize("text", ["input", "input=", "=1", "input=x", "input=nan", "input=inf", "input.=1", "input.5-3=1", "input.a=1"])
def test_what_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(BlockError) as error:
        BlockWeights.parse(text)
    assert text in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_texts(name: str) -> None:
    assert str(BlockWeights.parse(PRESETS[name])) == PRESETS[name]


# --- places of real names -----------------------------------------------------------------------------------

SQUARE, CONV = (64, 64), (64, 64, 3, 3)
U = "model.diffusion_model."
UNET = {
    f"{U}input_blocks.0.0.weight": (CONV, "input.0 conv"),
    f"{U}input_blocks.1.0.in_layers.2.weight": (CONV, "input.1 conv"),
    f"{U}input_blocks.1.0.emb_layers.1.weight": (SQUARE, "input.1 modulation"),
    f"{U}input_blocks.1.1.proj_in.weight": ((64, 64, 1, 1), "input.1 projection"),
    f"{U}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (SQUARE, "input.1 attention self"),
    f"{U}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (SQUARE, "input.1 attention cross"),
    f"{U}input_blocks.1.1.transformer_blocks.0.ff.net.2.weight": (SQUARE, "input.1 ff"),
    f"{U}input_blocks.2.0.op.weight": (CONV, "input.2 conv"),
    f"{U}middle_block.1.transformer_blocks.0.attn2.to_out.0.weight": (SQUARE, "middle.1 attention cross"),
    f"{U}output_blocks.11.0.skip_connection.weight": (CONV, "output.11 conv"),
    f"{U}time_embed.0.weight": (SQUARE, "other"),
    "cond_stage_model.transformer.text_model.encoder.layers.7.self_attn.q_proj.weight": (SQUARE, "te1.7 attention self"),
    "cond_stage_model.transformer.text_model.encoder.layers.7.mlp.fc1.weight": (SQUARE, "te1.7 ff"),
}
FLUX = {
    "double_blocks.3.img_attn.qkv.weight": ((192, 64), "double.3 attention"),
    "double_blocks.3.img_attn.proj.weight": (SQUARE, "double.3 attention"),
    "double_blocks.3.txt_mlp.0.weight": ((256, 64), "double.3 ff"),
    "double_blocks.3.img_mod.lin.weight": ((384, 64), "double.3 modulation"),
    "single_blocks.20.linear1.weight": ((448, 64), "single.20 attention ff"),
    "single_blocks.20.linear2.weight": ((64, 320), "single.20 attention ff"),
    "img_in.weight": (SQUARE, "other"),
}
SD35 = {
    "joint_blocks.0.x_block.attn2.qkv.weight": ((192, 64), "joint.0 attention"),
    "joint_blocks.0.context_block.mlp.fc2.weight": (SQUARE, "joint.0 ff"),
    "joint_blocks.0.x_block.adaLN_modulation.1.weight": ((576, 64), "joint.0 modulation"),
    "joint_blocks.0.x_block.attn.qkv.weight": ((192, 64), "joint.0 attention"),
    "x_embedder.proj.weight": ((64, 16, 2, 2), "other conv"),
}
OTHERS = {
    "blocks.4.cross_attn.q.weight": (SQUARE, "block.4 attention cross"),
    "blocks.4.self_attn.q.weight": (SQUARE, "block.4 attention self"),
    "blocks.4.ffn.0.weight": (SQUARE, "block.4 ff"),
    "blocks.4.cross_attn.norm_q.weight": ((64,), "block.4 attention cross"),
}
Z_IMAGE = {
    "noise_refiner.1.attention.qkv.weight": ((192, 64), "noise_refiner.1 attention"),
    "layers.5.feed_forward.w1.weight": (SQUARE, "block.5 ff"),
    "layers.5.attention.qkv.weight": ((192, 64), "block.5 attention"),
}


def words(found: Address) -> str:
    place = found.place if found.number is None else f"{found.place}.{found.number}"
    return " ".join([place, *(k for k in KINDS if k in found.kinds)])


@pytest.mark.parametrize("model", [UNET, FLUX, SD35, OTHERS, Z_IMAGE])
def test_places_of_layers(model: dict) -> None:
    index = NameIndex({key: shape for key, (shape, _) in model.items()})
    for key, (_, expected) in model.items():
        assert words(address(index, key)) == expected, key


def test_a_diffusers_model_answers_to_the_same_names() -> None:
    names = {
        "down_blocks.0.resnets.0.conv1.weight": CONV, "down_blocks.0.resnets.1.conv1.weight": CONV,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": SQUARE,
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q.weight": SQUARE,
        "down_blocks.0.downsamplers.0.conv.weight": CONV, "conv_in.weight": CONV,
        "down_blocks.1.resnets.0.conv1.weight": CONV, "down_blocks.1.attentions.0.proj_in.weight": SQUARE,
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": SQUARE, "mid_block.resnets.0.conv1.weight": CONV,
        "mid_block.resnets.1.conv1.weight": CONV,
        "up_blocks.0.resnets.0.conv1.weight": CONV, "up_blocks.0.resnets.1.conv1.weight": CONV,
        "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight": SQUARE,
    }
    index = NameIndex(names)
    got = {key: words(address(index, key)) for key in names}
    assert got["down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q.weight"] == "input.2 attention cross"
    assert got["down_blocks.1.attentions.0.proj_in.weight"] == "input.4 projection"
    assert got["down_blocks.0.downsamplers.0.conv.weight"] == "input.3 conv"
    assert got["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"] == "middle.1 attention self"
    assert got["up_blocks.0.attentions.1.transformer_blocks.0.ff.net.2.weight"] == "output.1 ff"
    flux = NameIndex({
        "transformer_blocks.1.attn.to_q.weight": SQUARE, "transformer_blocks.1.ff.net.2.weight": SQUARE,
        "single_transformer_blocks.2.proj_mlp.weight": SQUARE, "single_transformer_blocks.2.attn.to_q.weight": SQUARE,
        "single_transformer_blocks.2.attn.to_k.weight": SQUARE, "single_transformer_blocks.2.attn.to_v.weight": SQUARE,
        "single_transformer_blocks.2.proj_out.weight": (64, 128), "single_transformer_blocks.2.norm.linear.weight": SQUARE,
    })
    assert words(address(flux, "single_transformer_blocks.2.attn.to_q.weight")).startswith("single.2 attention")
    assert words(address(flux, "single_transformer_blocks.2.proj_out.weight")) == "single.2 attention ff"
    assert words(address(flux, "transformer_blocks.1.ff.net.2.weight")) == "double.1 ff"


def test_parts_of_a_fused_matrix() -> None:
    index = NameIndex({key: shape for key, (shape, _) in FLUX.items()})
    key = "single_blocks.20.linear1.weight"
    assert words(address(index, key, (0, 64))) == words(address(index, key, (0, 192))) == "single.20 attention"
    assert words(address(index, key, (192, 256))) == "single.20 ff"
    assert words(address(index, key, (0, 448))) == "single.20 attention ff"


def test_biases_are_where_their_weights_are() -> None:
    more = {f"{U}middle_block.1.proj_out.bias": (64,), f"{U}middle_block.1.proj_out.weight": SQUARE}
    index = NameIndex({**{k: s for k, (s, _) in UNET.items()}, **more})
    assert words(address(index, f"{U}middle_block.1.proj_out.bias")) == "middle.1 projection"
    assert address(NameIndex({"first_stage_model.decoder.conv_in.weight": CONV}), "first_stage_model.decoder.conv_in.weight") is None


def test_names_that_this_model_lacks_are_errors_that_list_what_it_has() -> None:
    index = NameIndex({key: shape for key, (shape, _) in UNET.items()})
    places = [(key, None) for key in UNET]
    for text in ("double=1", "input.9=0", "all=0, output.11/attention=1", "te2=0"):
        with pytest.raises(BlockError) as error:
            factors(BlockWeights.parse(text), index, places)
        said = str(error.value)
        assert text.split(", ")[-1].split("=")[0] in said
        assert all(name in said for name in ("input.0-2", "middle.1", "output.11", "other", "te1.7", "attention", "conv")), said
    # A side that is not at hand cannot be checked.
    bare = NameIndex({key: shape for key, (shape, _) in UNET.items() if key.startswith(U)})
    assert factors(BlockWeights.parse("te=0"), bare, [(f"{U}input_blocks.0.0.weight", None)]) == [1]
    text = NameIndex({key: shape for key, (shape, _) in UNET.items() if not key.startswith(U)})
    assert factors(BlockWeights.parse("double=0, te1=2"), text, places[-1:]) == [2]
    assert described([at("te1", 0), at("input", 3, "ff"), at("input", 1), at("input", 2)]) == ["input.1-3", "te1.0", "ff"]


def test_rules_without_a_layer_are_named() -> None:
    w = BlockWeights.parse("all=0, te=1, output.2/conv=1, input=0.5")
    assert w.idle([at("input", 3, "ff"), at("output", 2, "ff")]) == ["te", "output.2/conv"]


def test_counts() -> None:
    assert counted([1, 0.5, 1, 0, 1, 0.5]) == "3 weights ×1, 2 ×0.5, 1 ×0"


# --- a merged file ------------------------------------------------------------------------------------------


def test_merging_follows_the_blocks(tmp_path, capsys) -> None:
    g = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=g) for key, (shape, _) in UNET.items() if shape == SQUARE}
    save_file(base, tmp_path / "base.safetensors")
    tensors = {}
    for key in base:
        name = key.replace(U, "lora_unet_").replace("cond_stage_model.transformer.", "lora_te_").removesuffix(".weight").replace(".", "_")
        tensors[f"{name}.oft_blocks"] = torch.randn(8, 8, 8, generator=g) * 0.1
        tensors[f"{name}.alpha"] = torch.tensor(0.0)
    save_file(tensors, tmp_path / "oft.safetensors")
    adapter = load_adapter(tmp_path / "oft.safetensors")
    whole = {}
    for s in (0.25, 0.5, 1.0):
        merge_file(adapter, tmp_path / "base.safetensors", tmp_path / "out.safetensors", Strength(s))
        whole[s] = load_file(tmp_path / "out.safetensors")
    text = "middle=0, ff=0.5, te=0.25"
    command = ["merge", tmp_path / "oft.safetensors", tmp_path / "base.safetensors", "-o", tmp_path / "blocks.safetensors"]
    assert main([*map(str, command), "--blocks", text]) == 0
    got = load_file(tmp_path / "blocks.safetensors")
    for key, (_, expected) in UNET.items():
        if key in got:
            if expected.startswith("middle"):
                assert torch.equal(got[key], base[key])
            elif expected.endswith(" ff") and not expected.startswith("te"):
                assert torch.equal(got[key], whole[0.5][key]), key
            elif expected.startswith("te"):
                assert torch.equal(got[key], whole[0.25][key]), key
            else:
                assert torch.equal(got[key], whole[1.0][key]), key
            assert not torch.equal(whole[1.0][key], base[key])
    from safetensors import safe_open

    with safe_open(tmp_path / "blocks.safetensors", "pt") as f:
        assert json.loads(f.metadata()[METADATA_KEY])[0]["blocks"] == text
    halved = replace(adapter, blocks=BlockWeights.parse("all=0.5"))
    merge_file(halved, tmp_path / "base.safetensors", tmp_path / "out.safetensors", Strength(1.0))
    for key, value in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(value, whole[0.5][key])
    assert main([*map(str, command), "--blocks", "double=1"]) == 1
    assert "input.1" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["output.3-99=1", "output.20=1", "output.1+20=1", "output.20-30=1", "output.3-99/attention=1", "te.0-99=1"])
def test_blocks_beyond_the_model_are_refused_alone_and_in_ranges(text: str) -> None:
    known = {Address("output", n, frozenset({"attention"})) for n in range(12)} | {Address("te1", n, frozenset()) for n in range(12)}
    with pytest.raises(BlockError, match="no such block"):
        BlockWeights.parse(text).check(known)
    BlockWeights.parse("output.3-11=1, output.0-3/attention=0.5, te.0-11=1, all=0").check(known)
