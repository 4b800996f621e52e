"""The setting that makes other loaders read OFT files: pictures of ComfyUI's own LoRA loader against ours, on
and off, over HTTP.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dev.client import Client, Graph, PromptFailed
from dev.page import NO_BROWSER, ComfyPage, find_browser
from dev.server import ComfyServer
from dev.workflows import Parts, stock_parts, text_to_image

ROUTE = "/oft/everywhere"
FAR = "lora_unet_double_blocks_0_img_attn_proj"


def turn(client: Client, on: bool) -> dict:
    return client.json(ROUTE, data={"on": on}, method="POST")


@pytest.fixture(autouse=True)
def off_before_and_after(client: Client):
    turn(client, False)
    yield
    turn(client, False)


def unet_modules(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """kohya's names and the shapes of the attention weights of the tiny SD1.5."""
    prefix = "model.diffusion_model."
    with safe_open(checkpoint, "pt") as f:
        shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118 (a file handle)
    return {
        "lora_unet_" + k.removeprefix(prefix).removesuffix(".weight").replace(".", "_"): s
        for k, s in shapes.items()
        if k.startswith(prefix) and re.search(r"attn\d\.to_.*weight$", k)
    }


TEXT = {f"lora_te_text_model_encoder_layers_{i}_self_attn_q_proj": (768, 768) for i in range(2)}



def make_oft(
    shapes: dict[str, tuple[int, ...]], side: str, block: int = 8, degrees: float = 25.0
) -> dict[str, torch.Tensor]:
    """Random adapter tensors for modules {name: weight shape}: LyCORIS (out) or OneTrainer (in)."""
    out, g = {}, torch.Generator().manual_seed(7)
    size = degrees / 57.3 / 2 / block**0.5
    for name, shape in shapes.items():
        if side == "out":
            out[f"{name}.oft_blocks"] = torch.randn(shape[0] // block, block, block, generator=g) * size / 2
            out[f"{name}.alpha"] = torch.tensor(0.0)
        else:
            packed = torch.randn(shape[1] // block, block * (block - 1) // 2, generator=g)
            out[f"{name}.oft_R.weight"] = packed * size
    return out


def lora(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    out, g = {}, torch.Generator().manual_seed(5)
    for name, shape in shapes.items():
        out[f"{name}.lora_down.weight"] = torch.randn(4, shape[1], generator=g) * 0.2
        out[f"{name}.lora_up.weight"] = torch.randn(shape[0], 4, generator=g) * 0.2
        out[f"{name}.alpha"] = torch.tensor(2.0)
    return out


@pytest.fixture(scope="module")
def files(models: Path, host: ComfyServer) -> dict[str, str]:
    """Files in the lora folder: {what: name}."""
    unet = unet_modules(models / "checkpoints" / "tiny_sd15.safetensors")
    half = len(unet) // 2
    first, second = dict(list(unet.items())[:half]), dict(list(unet.items())[half:])
    # The date makes a difference to the series of this dialect, but only the file's metadata tells it.
    dated = {"modelspec.date": "2025-11-14", "ot_branch": "master"}
    contents = {
        "input": (make_oft(unet | TEXT, "in"), None),
        "dated": (make_oft(unet, "in", degrees=70.0), dated),
        "output": (make_oft(unet, "out"), None),
        "lora": (lora(unet), None),
        "mixed": (make_oft(first, "in") | lora(second), None),
        "mixed_oft": (make_oft(first, "in"), None),
        "mixed_lora": (lora(second), None),
        "narrow": (make_oft({"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k": (32, 32)}, "in"), None),
        "flux": (make_oft({FAR: (3072, 3072)}, "in", 64), None),
        "nan": ({k: v * float("nan") for k, v in make_oft(first, "in").items()}, None),
    }
    (host.models / "loras" / "everywhere").mkdir(parents=True, exist_ok=True)
    names = {}
    for what, (tensors, metadata) in contents.items():
        names[what] = f"everywhere/{what}.safetensors"
        save_file(tensors, host.models / "loras" / names[what], metadata)
    return names


def core(name: str, strength: float):
    def add(g: Graph, parts: Parts) -> Parts:
        node = g.LoraLoaderModelOnly(model=parts.model, lora_name=name, strength_model=strength)
        return Parts(node[0], parts.clip, parts.vae)

    return add


def ours(name: str, strength: float):
    def add(g: Graph, parts: Parts) -> Parts:
        node = g.OFT_LoadModelOnly(model=parts.model, oft_name=name, strength_model=strength)
        return Parts(node[0], parts.clip, parts.vae)

    return add


def picture(client: Client, adapter=None) -> np.ndarray:
    g = Graph()
    preview = text_to_image(g, stock_parts(g, "sd15"), "sd15", adapter=adapter)
    return client.run(g).image(preview).astype(int)


def log_of(host: ComfyServer, act) -> tuple[object, str]:
    """What `act()` gives, and what the server logged meanwhile."""
    before = len(host.log_text())
    result = act()
    return result, host.log_text()[before:]


def test_on_is_our_loader_and_off_is_stock(client: Client, host: ComfyServer, files: dict[str, str]) -> None:
    assert client.json(ROUTE) == {"on": False}
    base, expected = picture(client), picture(client, ours(files["input"], 0.7))
    stock = picture(client, core(files["input"], 0.7))
    assert (stock == base).all(), "ComfyUI itself reads nothing of this dialect"
    assert turn(client, True) == {"on": True, "notes": []}
    # The same graph as before: what its nodes gave is not taken for what they would give now.
    got, said = log_of(host, lambda: picture(client, core(files["input"], 0.7)))
    assert (got == expected).all() and np.abs(got - base).max() > 3
    assert "OFT everywhere" in said and files["input"].rsplit("/")[-1] in said
    turn(client, False)
    assert (picture(client, core(files["input"], 0.7)) == stock).all()


def test_the_files_metadata_is_seen(client: Client, files: dict[str, str]) -> None:
    turn(client, True)
    got = picture(client, core(files["dated"], 1.0))
    assert (got == picture(client, ours(files["dated"], 1.0))).all()


def test_text_encoders_and_their_strength(client: Client, files: dict[str, str]) -> None:
    def loader(kind: str, name: str, **more: object):
        def add(g: Graph, parts: Parts) -> Parts:
            inputs = {"model": parts.model, "clip": parts.clip, "strength_model": 0.5, "strength_clip": 1.2}
            node = g.add(kind, **inputs, **{name: files["input"]}, **more)
            return Parts(node[0], node[1], parts.vae)

        return add

    turn(client, True)
    got = picture(client, loader("LoraLoader", "lora_name"))
    assert (got == picture(client, loader("OFT_Load", "oft_name"))).all()
    assert (got != picture(client, core(files["input"], 0.5))).any()


def test_a_plain_lora_is_left_alone(client: Client, host: ComfyServer, files: dict[str, str]) -> None:
    base, stock = picture(client), picture(client, core(files["lora"], 0.8))
    turn(client, True)
    got, said = log_of(host, lambda: picture(client, core(files["lora"], 0.8)))
    assert (got == stock).all() and np.abs(got - base).max() > 3
    assert "OFT everywhere" not in said


def test_what_comfyui_reads_rightly_is_left_to_it(
    client: Client, host: ComfyServer, files: dict[str, str]
) -> None:
    # On a CPU this model is stored and computed in float32.
    base, stock = picture(client), picture(client, core(files["output"], 1.0))
    turn(client, True)
    got, said = log_of(host, lambda: picture(client, core(files["output"], 1.0)))
    assert (got == stock).all() and (got != base).any() and "left to ComfyUI's own loader" in said
    # At other strengths ComfyUI squares.
    got, said = log_of(host, lambda: picture(client, core(files["output"], 0.5)))
    assert (got == picture(client, ours(files["output"], 0.5))).all() and "read by the OFT pack" in said


def test_mixed_files_go_both_ways(client: Client, host: ComfyServer, files: dict[str, str]) -> None:
    def both(g: Graph, parts: Parts) -> Parts:
        return core(files["mixed_lora"], 0.6)(g, ours(files["mixed_oft"], 0.6)(g, parts))

    expected = picture(client, both)
    turn(client, True)
    got, said = log_of(host, lambda: picture(client, core(files["mixed"], 0.6)))
    assert (got == expected).all()
    assert "other tensors" in said and "lora key not loaded" not in said


def test_hooks(client: Client, files: dict[str, str]) -> None:
    def hooked(make):
        g = Graph()
        parts = stock_parts(g, "sd15")
        set_hooks = {"strength": 1.0, "set_cond_area": "default", "hooks": make(g)}
        positive = g.CLIPTextEncode(clip=parts.clip, text="a red cat")
        positive = g.ConditioningSetProperties(cond_NEW=positive, **set_hooks)[0]
        sampled = g.KSampler(
            model=parts.model,
            positive=positive,
            negative=g.CLIPTextEncode(clip=parts.clip, text="blurry"),
            latent_image=g.EmptyLatentImage(width=64, height=64, batch_size=1),
            seed=3,
            steps=2,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        preview = g.PreviewImage(images=g.VAEDecode(samples=sampled, vae=parts.vae))
        return client.run(g).image(preview).astype(int)

    def theirs(what: str):
        return lambda g: g.CreateHookLora(lora_name=files[what], strength_model=0.7, strength_clip=0.7)[0]

    def own(g: Graph):
        adapter = g.OFT_LoadAdapter(oft_name=files["input"])
        return g.OFT_Hook(
            adapter=adapter, strength_model=0.7, strength_clip=0.7, mode="rotation", coft="file"
        )[0]

    expected, stock, plain = hooked(own), hooked(theirs("input")), hooked(theirs("lora"))
    turn(client, True)
    assert (hooked(theirs("input")) == expected).all() and (expected != stock).any()
    assert (hooked(theirs("lora")) == plain).all() and (plain != stock).any()
    turn(client, False)
    assert (hooked(theirs("input")) == stock).all()


def by_names(name: str, strength: float, without: str = ""):
    def add(g: Graph, parts: Parts) -> Parts:
        node = g.Tiny_LoraByNames(
            model=parts.model, clip=parts.clip, lora_name=name, strength_model=strength, strength_clip=strength / 2,
            without=without,
        )  # fmt: skip
        return Parts(node[0], node[1], parts.vae)

    return add


def test_packs_that_add_the_patches_themselves(
    client: Client, host: ComfyServer, files: dict[str, str]
) -> None:
    def whole(g: Graph, parts: Parts) -> Parts:
        node = g.OFT_Load(
            model=parts.model, clip=parts.clip, oft_name=files["input"], strength_model=0.8, strength_clip=0.4
        )
        return Parts(node[0], node[1], parts.vae)

    base, expected = picture(client), picture(client, whole)
    assert (picture(client, by_names(files["input"], 0.8)) == base).all()
    plain, mixed = picture(client, by_names(files["lora"], 0.8)), picture(client, by_names(files["mixed_lora"], 0.8))
    turn(client, True)
    result, said = log_of(host, lambda: picture(client, by_names(files["input"], 0.8)))
    assert (result == expected).all() and "as patches for another pack" in said
    part = picture(client, by_names(files["input"], 0.8, without="input_blocks"))
    assert (part != expected).any() and (part != base).any(), "the pack's own choice of layers counts"
    result, said = log_of(host, lambda: picture(client, by_names(files["lora"], 0.8)))
    assert (result == plain).all() and "OFT everywhere" not in said
    assert (picture(client, by_names(files["mixed"], 0.8)) != mixed).any(), "rotations beside a LoRA are used too"
    result, said = log_of(host, lambda: picture(client, by_names(files["flux"], 0.8)))
    assert (result == base).all() and "left to ComfyUI" in said
    turn(client, False)
    assert (picture(client, by_names(files["input"], 0.8)) == base).all()


def test_a_pack_is_told_what_patches_of_packed_weights_cost(
    client: Client, host: ComfyServer, files: dict[str, str]
) -> None:
    """Such packs can only have weight patches, which is not what Load OFT would choose there."""

    def packed(g: Graph, parts: Parts) -> Parts:
        return by_names(files["narrow"], 0.8)(g, Parts(g.Tiny_Packed(family="sd15")[0], parts.clip, parts.vae))

    turn(client, True)
    _, said = log_of(host, lambda: picture(client, packed))
    assert "unpacked and patched in every step" in said, said


def test_a_file_for_another_model_is_left_to_comfyui(
    client: Client, host: ComfyServer, files: dict[str, str]
) -> None:
    base = picture(client)
    turn(client, True)
    got, said = log_of(host, lambda: picture(client, core(files["flux"], 0.5)))
    assert (got == base).all() and "left to ComfyUI's own loader" in said and "Flux" in said


def test_a_broken_oft_file_is_an_error(client: Client, files: dict[str, str]) -> None:
    turn(client, True)
    with pytest.raises(PromptFailed, match="NaN") as failed:
        picture(client, core(files["nan"], 1.0))
    assert failed.value.node_type == "LoraLoaderModelOnly"
    turn(client, False)
    assert picture(client, core(files["lora"], 1.0)).std() > 5


@pytest.mark.parametrize("data", [None, [], {}, {"on": 1}, {"on": "true"}])
def test_only_a_truth_value_is_taken(client: Client, data: object) -> None:
    status, body = client.fetch(ROUTE, data=data, method="POST")
    assert status == 400 and "expected" in json.loads(body)["error"]
    assert client.json(ROUTE) == {"on": False}


@pytest.mark.page
def test_the_settings_dialog_switches_the_server(client: Client, host: ComfyServer) -> None:
    pytest.importorskip("playwright")
    if find_browser() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_BROWSER)
    with ComfyPage(host.url) as page:
        # Opening the page changes nothing on the server.
        turn(client, True)
        page.page.reload(wait_until="domcontentloaded")
        ready = "() => window.app?.extensionManager?.setting.get('OFT.everywhere') === false"
        page.page.wait_for_function(ready, timeout=60_000)
        page.page.wait_for_timeout(500)
        assert client.json(ROUTE) == {"on": True}
        turn(client, False)
        for on in (True, False):
            # The dialog's own way of changing a setting.
            with page.page.expect_response(lambda answer: answer.url.endswith(ROUTE)):
                page.page.evaluate("(on) => app.extensionManager.setting.set('OFT.everywhere', on)", on)
            assert client.json(ROUTE) == {"on": on}
            assert client.json("/settings/OFT.everywhere") is on
        said = client.json("/i18n")
        for language in ("en", "zh"):
            assert set(said[language]["settings"]["OFT_everywhere"]) == {"name", "tooltip"}
        assert not [text for text, _ in page.errors if "everywhere" in text.lower()]
