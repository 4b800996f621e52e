"""OFT Block Strengths in a running ComfyUI: pictures against files without the other layers, and errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dev.client import Client, Graph, PromptFailed, PromptRejected
from dev.oft_files import write_random_oft
from dev.server import ComfyServer
from dev.workflows import Parts, stock_parts, text_to_image, tiny_parts
from oft_core.cli import main

EVERYTHING = r"."  # convolutions and embeddings too
FILE = "blocks/everything.safetensors"


@pytest.fixture(scope="module")
def files(models: Path, oft_dir: Path) -> dict[str, torch.Tensor]:
    """An adapter of all layers of the stock tiny SD1.5 and its text encoder; returns its tensors."""
    base = models / "checkpoints" / "tiny_sd15.safetensors"
    write_random_oft(base, oft_dir / FILE, layers=EVERYTHING, degrees=30, block_size=32)
    return load_file(oft_dir / FILE)


def part_of(oft_dir: Path, tensors: dict[str, torch.Tensor], name: str, pattern: str) -> str:
    """A file with only those layers whose name matches."""
    chosen = {k: v for k, v in tensors.items() if re.search(pattern, k)}
    assert 0 < len(chosen) < len(tensors)
    save_file(chosen, oft_dir / "blocks" / f"{name}.safetensors")
    return f"blocks/{name}.safetensors"


def load(name: str, s: float = 1.0):
    def add(g: Graph, parts: Parts) -> Parts:
        node = g.OFT_Load(
            model=parts.model, clip=parts.clip, oft_name=name, strength_model=s, strength_clip=s
        )
        return Parts(node[0], node[1], parts.vae)

    return add


def blocked(text: str, preset: str = "none", s: float = 1.0, name: str = FILE, **more):
    def add(g: Graph, parts: Parts) -> Parts:
        adapter = g.OFT_Blocks(adapter=g.OFT_LoadAdapter(oft_name=name)[0], preset=preset, blocks=text)
        node = g.OFT_Apply(
            adapter=adapter[0], model=parts.model, clip=parts.clip, strength_model=s, strength_clip=s, **more
        )
        return Parts(node[0], node[1], parts.vae)

    return add


def picture(client: Client, adapter=None) -> np.ndarray:
    g = Graph()
    preview = text_to_image(g, stock_parts(g, "sd15"), "sd15", adapter=adapter)
    return client.run(g).image(preview).astype(int)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 1)


ONLY = {
    "all=0, output=1": "unet_output_blocks",
    "all=0, input.0-2=1": "unet_input_blocks_[012]_",
    "all=0, middle/attention=1": r"unet_middle_block_.*attn\d_to_",
    "all=0, conv=1": r"_in_layers_2|_out_layers_3|_op\.|_conv\.|skip_connection|blocks_0_0\.|out_2\.",
    "all=0, te.0-1=1": r"lora_te_.*layers_[01]_",
    "te=0": "unet_",
}


@pytest.mark.parametrize("text", ONLY)
def test_only_some_blocks_is_a_file_with_only_those(
    client: Client, oft_dir: Path, files: dict[str, torch.Tensor], text: str
) -> None:
    name = part_of(oft_dir, files, re.sub(r"\W+", "_", text), ONLY[text])
    got, expected = picture(client, blocked(text)), picture(client, load(name))
    assert (got == expected).all()
    assert not same(expected, picture(client)) and not same(expected, picture(client, load(FILE)))


def test_factors_are_strengths_of_their_own(
    client: Client, oft_dir: Path, files: dict[str, torch.Tensor]
) -> None:
    """Two files with a half each, at the strengths that the text gives them; the slider multiplies."""
    one = part_of(oft_dir, files, "half_out", "unet_output_blocks")
    two = part_of(oft_dir, files, "half_rest", "^(?!lora_unet_output_blocks)")

    def both(g: Graph, parts: Parts) -> Parts:
        return load(two, -0.6)(g, load(one, 0.4)(g, parts))

    got = picture(client, blocked("all=-0.75, output=0.5", s=0.8))
    assert (got == picture(client, both)).all()
    live = picture(client, blocked("all=-0.75, output=0.5", s=0.8, runtime="activations"))
    assert same(live, got)
    assert not same(got, picture(client, load(FILE, 0.8)))


def test_merged_file_with_the_same_text(
    client: Client, host: ComfyServer, models: Path, oft_dir: Path, files: dict[str, torch.Tensor]
) -> None:
    text = "all=0.3, input.1/attention=1, te1.3-7=-1, conv=0"
    baked = host.models / "checkpoints" / "blocks_baked.safetensors"
    command = [oft_dir / FILE, models / "checkpoints" / "tiny_sd15.safetensors", "-o", baked]
    assert main(["merge", *map(str, command), "--dtype", "fp32", "--blocks", text]) == 0
    try:
        g = Graph()
        node = g.CheckpointLoaderSimple(ckpt_name=baked.name)
        preview = text_to_image(g, Parts(node[0], node[1], node[2]), "sd15")
        expected = client.run(g).image(preview).astype(int)
    finally:
        baked.unlink()
    assert same(picture(client, blocked(text)), expected)


def test_factor_one_and_zero(client: Client, files: dict[str, torch.Tensor]) -> None:
    whole = picture(client, load(FILE))
    for text in ("", "all=1", "all=0, all=1"):
        assert (picture(client, blocked(text)) == whole).all()
    assert (picture(client, blocked("all=0")) == picture(client)).all()


def test_presets_come_first_and_the_text_comes_back(client: Client, files: dict[str, torch.Tensor]) -> None:
    def run(adapter, preset: str, text: str) -> tuple[np.ndarray, str, str]:
        g = Graph()
        node = g.OFT_Blocks(adapter=adapter(g), preset=preset, blocks=text)
        parts = stock_parts(g, "sd15")
        applied = g.OFT_Apply(
            adapter=node[0], model=parts.model, clip=parts.clip, strength_model=1.0, strength_clip=1.0
        )
        show = g.PreviewAny(source=node[1])
        preview = text_to_image(g, Parts(applied[0], applied[1], parts.vae), "sd15")
        result = client.run(g)
        return result.image(preview), result.text(show), result.text(applied)

    def fresh(g: Graph):
        return g.OFT_LoadAdapter(oft_name=FILE)[0]

    image, text, report = run(fresh, "SD, SDXL: output only", "output.1 = .5")
    assert text == "all=0, output=1, output.1=0.5"
    assert "Strength by block (all=0, output=1, output.1=0.5)" in report and "weights ×0" in report
    assert (run(fresh, "none", text)[0] == image).all(), "pasted into another node"

    def twice(g: Graph):
        return g.OFT_Blocks(adapter=fresh(g), preset="SD, SDXL: output only", blocks="")[0]

    assert (run(twice, "none", "output.1=0.5")[0] == image).all()
    idle = run(fresh, "none", "all=0, te=0, input/modulation=1")[2]
    assert "no layer" not in idle
    missing = run(lambda g: g.OFT_LoadAdapter(oft_name="blocks/te_0.safetensors")[0], "none", "te1=0.5")[2]
    assert "The file has no layer in: te1" in missing


def test_in_a_stack(client: Client, oft_dir: Path, files: dict[str, torch.Tensor]) -> None:
    name = part_of(oft_dir, files, "stack_out", "unet_output_blocks")

    def stacked(g: Graph, parts: Parts, how: str) -> Parts:
        adapter = g.OFT_Blocks(
            adapter=g.OFT_LoadAdapter(oft_name=FILE)[0], preset="none", blocks="all=0, output=1"
        )
        stack = g.OFT_Stack(mode="rotation", coft="file", adapter_1=adapter[0], strength_model_1=0.7)
        node = g.OFT_ApplyStack(stack=stack[0], model=parts.model, clip=parts.clip, how=how)
        return Parts(node[0], node[1], parts.vae)

    expected = picture(client, load(name, 0.7))
    assert (picture(client, lambda g, parts: stacked(g, parts, "compose")) == expected).all()
    assert same(picture(client, lambda g, parts: stacked(g, parts, "blend")), expected)


@pytest.mark.parametrize("text", ["outpt=1", "input.2-1=1", "all=many", "input/atention=0.5"])
def test_unknown_names_are_rejected_before_the_run(
    client: Client, files: dict[str, torch.Tensor], text: str
) -> None:
    with pytest.raises(PromptRejected) as rejected:
        picture(client, blocked(text))
    said = str(rejected.value)
    assert text.split("/")[-1].split("=")[0] in said
    if "outpt" in text or "atention" in text:
        assert all(name in said for name in ("output", "double", "te1", "attention", "conv"))


def test_blocks_that_the_model_lacks_are_explained(client: Client, files: dict[str, torch.Tensor]) -> None:
    other_family = blocked("", preset="Flux: single blocks only")
    for adapter in (blocked("double=1"), other_family, blocked("input.9=0")):
        with pytest.raises(PromptFailed) as failed:
            picture(client, adapter)
        error = failed.value
        assert error.node_type == "OFT_Apply"
        for words in ("no such block", "input.0-3", "output.0-3", "te1.0-11"):
            assert words in error.text, error.text


def test_saving_does_not_forget_blocks_silently(client: Client, files: dict[str, torch.Tensor]) -> None:
    g = Graph()
    adapter = g.OFT_Blocks(adapter=g.OFT_LoadAdapter(oft_name=FILE)[0], preset="none", blocks="all=0.5")
    g.OFT_Save(adapter=adapter[0], name="blocks_saved", dialect="as it is", precision="fp32", folder="output")
    with pytest.raises(PromptFailed, match="no place for strengths"):
        client.run(g)


FAMILIES = {
    "flux": ("double.1=0.5, all=0, single.0=1", "lora_unet_single_blocks_0_linear2", (64, 320)),
    "sd3": ("all=0, joint.1=1", "lora_unet_joint_blocks_1_x_block_attn_proj", (128, 128)),
    "sdxl": ("all=0, input.1-3=1", "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q", (64, 64)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(client: Client, host: ComfyServer, oft_dir: Path, family: str) -> None:
    """A file of two layers, of which the text leaves one: the weights of a file with that one alone."""
    text, name, shape = FAMILIES[family]
    other = {
        "flux": "lora_unet_double_blocks_1_img_attn_proj",
        "sd3": "lora_unet_joint_blocks_0_x_block_attn_proj",
        "sdxl": "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q",
    }[family]
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{n}.oft_blocks": torch.randn(shape[0] // 8, 8, 8, generator=g) * 0.1 for n in (name, other)
    } | {f"{n}.alpha": torch.tensor(0.0) for n in (name, other)}
    both, one = f"blocks/{family}_both.safetensors", f"blocks/{family}_one.safetensors"
    (oft_dir / "blocks").mkdir(exist_ok=True)
    save_file(tensors, oft_dir / both)
    save_file({k: v for k, v in tensors.items() if k.startswith(name)}, oft_dir / one)
    graph = Graph()
    parts = tiny_parts(graph, family)
    ways = {"text": blocked(text, name=both), "one": load(one), "both": load(both)}
    for label, way in ways.items():
        made = way(graph, parts)
        graph.Tiny_SaveWeights(pattern="blocks", filename=f"blocks_{label}", model=made.model)
    client.run(graph)
    got, expected, whole = (load_file(host.output / f"blocks_{label}.safetensors") for label in ways)
    assert all(torch.equal(got[k], expected[k]) for k in got)
    assert any(not torch.equal(got[k], whole[k]) for k in got)
