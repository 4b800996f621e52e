"""The training nodes in a running ComfyUI, over HTTP: every family, use in the same run, stop, resume, kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dev.client import Client, Graph, Node, PromptFailed, PromptRejected
from dev.server import ComfyServer
from dev.workflows import FAMILIES, Parts, stock_parts, text_to_image, tiny_parts
from oft_core import load_adapter

PROMPT = "a photo of ohwx"


@pytest.fixture(scope="module")
def subject(host: ComfyServer) -> str:
    """A folder of pictures inside the server's input folder."""
    return write_pictures(host)


def write_pictures(host: ComfyServer, name: str = "subject") -> str:
    folder = host.input / name
    folder.mkdir(exist_ok=True)
    rows, columns = np.mgrid[0:64, 0:64] / 64
    for i in range(2):
        picture = np.stack([rows, columns * i, 1 - rows], -1)
        Image.fromarray((picture * 255).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("standing in a field", encoding="utf-8")
    return name


def training(
    g: Graph, parts: Parts, folder: str, name: str, *, settings: dict | None = None, **knobs
) -> Node:
    """Dataset, settings and training nodes; returns the training node."""
    of = g.OFT_Dataset(
        folder=folder,
        captions="",
        instance_prompt="a photo of [trigger]",
        trigger="ohwx",
        class_prompt="",
        resolution=64,
    )
    config = g.OFT_TrainConfig(sample_steps=2, sample_cfg=1.0, **(settings or {}))
    options = {
        "preset": "subject",
        "steps": 4,
        "learning_rate": 0.03,
        "block_size": 8,
        "coft": "off",
        "coft_degrees": 15.0,
        "coft_eps": 6e-5,
        "seed": 1,
        "sample_prompts": PROMPT,
        "sample_every": 0,
        "save_every": 0,
        "low_vram": "checkpointing",
        "resume": True,
        **knobs,
    }
    return g.OFT_Train(
        model=parts.model, clip=parts.clip, vae=parts.vae, dataset=of, config=config, name=name, **options
    )


def file_of(host: ComfyServer, name: str) -> Path:
    found = sorted((host.models / "oft").glob(f"{name}_?????_.safetensors"))
    assert found, f"no file {name}"
    return found[-1]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in FAMILIES),
        ("sd15", {"bias": "all", "modules_to_save": "out"}),
        ("flux", {"use_cayley_neumann": True, "num_cayley_neumann_terms": 7, "bias": "oft_only"}),
    ],
)
def test_a_family_trains_and_its_file_loads(
    host: ComfyServer, client: Client, subject: str, family: str, settings: dict
) -> None:
    """The adapter in the same run, the file in the loader, and the trainer's own sample are one picture."""
    g = Graph()
    parts = tiny_parts(g, family)
    train = training(g, parts, subject, f"http/{family}", steps=20, settings=settings)

    def applied(g: Graph, parts: Parts) -> Parts:
        node = g.OFT_Apply(adapter=train[0], model=parts.model, strength_model=1.0, strength_clip=1.0)
        return Parts(node[0], parts.clip, parts.vae)

    options = {"text": PROMPT, "cfg": 1.0, "seed": 1, "steps": 2}
    in_run = text_to_image(g, parts, family, adapter=applied, **options)
    base = text_to_image(g, parts, family, **options)
    samples = g.PreviewImage(images=train[1])
    curve = g.PreviewImage(images=train[2])
    first = client.run(g, timeout=300)
    assert "20 steps" in first.text(train) and f"http/{family}" in first.text(train)
    assert first.image(curve).shape == (320, 640, 3)
    name = f"http/{file_of(host, f'http/{family}').name}"
    assert name in client.choices("OFT_Load", "oft_name"), "the file is not in the list"

    g = Graph()
    parts = tiny_parts(g, family)

    def from_file(g: Graph, parts: Parts) -> Parts:
        node = g.OFT_LoadModelOnly(model=parts.model, oft_name=name, strength_model=1.0)
        return Parts(node[0], parts.clip, parts.vae)

    loaded = text_to_image(g, parts, family, adapter=from_file, **options)
    untrained = text_to_image(g, parts, family, **options)
    second = client.run(g)
    trained = first.image(in_run)
    assert (second.image(loaded) == trained).all(), (
        "the file draws another picture than the adapter in memory"
    )
    sample = first.image(samples).astype(int)
    assert np.abs(sample - trained).max() <= 1, "the sample is not the trained model's picture"
    assert np.abs(trained.astype(int) - first.image(base)).max() > 5, "training changed nothing"
    assert (first.image(base) == second.image(untrained)).all(), "the base model has changed"


def test_the_dataset_node_shows_what_it_found(client: Client, subject: str) -> None:
    g = Graph()
    of = g.OFT_Dataset(
        folder=subject,
        captions="\nby hand",
        instance_prompt="",
        trigger="ohwx",
        class_prompt="",
        resolution=64,
    )
    sheet = g.PreviewImage(images=of[2])
    result = client.run(g)
    text = result.text(of)
    assert "2 pictures" in text and "64 x 64: 2" in text and "ohwx, standing in a field" in text
    assert result.image(sheet).shape[1] == 2 * 192


def test_pictures_over_links_and_saving(host: ComfyServer, client: Client, subject: str) -> None:
    for i in range(2):
        Image.open(host.input / subject / f"{i}.png").save(host.input / f"linked{i}.png")
    g = Graph()
    parts = tiny_parts(g, "sd15")
    one, two = (g.LoadImage(image=f"linked{i}.png") for i in range(2))
    of = g.OFT_Dataset(
        pictures=g.ImageBatch(image1=one[0], image2=two[0]),
        folder="(none)",
        captions="a\nb",
        instance_prompt="",
        trigger="",
        class_prompt="",
        resolution=64,
    )
    train = training(g, parts, subject, "http/linked", steps=2).set(dataset=of)
    save = g.OFT_Save(
        adapter=train[0],
        model=parts.model,
        name="http/as_peft",
        dialect="peft",
        precision="fp16",
        folder="oft",
    )
    text = client.run(g).text(save)
    name = text.removeprefix("Saved: ").strip()
    assert name in client.choices("OFT_Load", "oft_name")
    g = Graph()
    node = g.OFT_LoadModelOnly(model=tiny_parts(g, "sd15").model, oft_name=name, strength_model=1.0)
    g.Tiny_SaveWeights(pattern="attn1.to_q", filename="peft", model=node[0])
    assert "PEFT" in client.run(g).text(node)


def test_the_file_names_the_model_that_it_was_trained_on(
    host: ComfyServer, client: Client, models: Path, subject: str
) -> None:
    """Found through the graph, past a node that patches the model; a model without a file has none."""
    g = Graph()
    parts = stock_parts(g, "sd15")
    patched = g.ModelSamplingDiscrete(model=parts.model, sampling="eps", zsnr=False)
    training(g, Parts(patched[0], parts.clip, parts.vae), subject, "http/named", steps=1)
    client.run(g, timeout=300)
    metadata = load_adapter(file_of(host, "http/named")).metadata
    base = models / "checkpoints" / "tiny_sd15.safetensors"
    assert metadata["ss_sd_model_name"] == base.name
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(base.read_bytes()).hexdigest()

    g = Graph()
    training(g, tiny_parts(g, "sd15"), subject, "http/unnamed", steps=1)
    client.run(g)
    metadata = load_adapter(file_of(host, "http/unnamed")).metadata
    assert "ss_sd_model_name" not in metadata and len(json.loads(metadata["oft_model"])["model"]) == 32


def test_same_graph_again_does_not_train(host: ComfyServer, client: Client, subject: str) -> None:
    """Another save interval makes the server run the node again, but asks for nothing that is not there."""
    g = Graph()
    train = training(g, tiny_parts(g, "sd15"), subject, "http/again", steps=30)
    first = client.run(g, timeout=300)
    train.set(save_every=7)
    second = client.run(g)
    assert train.id not in second.cached, "this tests the server's own cache"
    assert "nothing was trained again" in second.text(train)
    assert "nothing was trained again" not in first.text(train)
    assert len(list((host.models / "oft" / "http").glob("again_*"))) == 1


def states(server: ComfyServer) -> list[Path]:
    return sorted((server.work_dir / "user" / "__oft" / "training").glob("*/state-*.safetensors"))


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_stop_and_kill_keep_the_work(make_server) -> None:
    """Interrupt a run, go on, kill the server in the middle, go on: the file is that of a run without a break."""
    server = make_server()
    client = server.client()
    folder = write_pictures(server)

    def graph(name: str, **knobs) -> tuple[Graph, Node]:
        g = Graph()
        return g, training(g, tiny_parts(g, "sd15"), folder, name, steps=36, save_every=3, **knobs)

    g, _ = graph("stopped")
    presser = threading.Thread(target=lambda: (wait_for(lambda: states(server)), client.interrupt()))
    presser.start()
    result = client.run(g, check=False, timeout=300)
    presser.join()
    assert result.error is not None and result.error.kind == "Interrupted"
    kept = file_of(server, "stopped")
    at = int(states(server)[-1].stem.removeprefix("state-"))
    assert 0 < at < 36 and load_file(kept)
    picture = Graph()
    preview = text_to_image(picture, tiny_parts(picture, "sd15"), "sd15")
    assert client.run(picture).image(preview).std() > 5, "the server does not go on"

    def until_the_server_dies() -> None:
        with contextlib.suppress(OSError, aiohttp.ClientError):
            client.run(g, timeout=300)

    begun = threading.Thread(target=until_the_server_dies)
    begun.start()
    wait_for(lambda: int(states(server)[-1].stem.removeprefix("state-")) > at)
    server.process.kill()
    server.process.wait()
    begun.join()
    # What a kill in the middle of writing leaves behind.
    (kept.parent / f".{kept.stem}step000010.safetensors.x1y2z3.partial").write_bytes(b"half")
    server.process = None
    server.port = 0
    server.start()
    client = server.client()
    g, train = graph("stopped")
    text = client.run(g, timeout=300).text(train)
    assert "of them from an earlier run" in text, text
    assert file_of(server, "stopped") == kept

    g, train = graph("whole", resume=False)
    assert "earlier run" not in client.run(g, timeout=300).text(train)
    broken, whole = load_file(kept), load_file(file_of(server, "whole"))
    assert broken.keys() == whole.keys() and all((broken[k] == whole[k]).all() for k in whole)
    assert not list(server.models.glob("oft/**/*.part*")), "half-written files were left"


def test_progress_and_live_pictures_arrive(client: Client, subject: str) -> None:
    g = Graph()
    train = training(g, tiny_parts(g, "sd15"), subject, "http/live", steps=6, sample_every=2)
    result = client.run(g)
    steps = [
        node["value"]
        for data in result.event("progress_state")
        for node in data["nodes"].values()
        if str(node["node_id"]) == train.id
    ]
    assert max(steps) == 6
    pictures = [b["bytes"] for b in result.event("binary")]
    assert sum(size > 400 for size in pictures) >= 3, pictures


@pytest.mark.parametrize(
    ("settings", "knobs", "words"),
    [
        ({"target_modules": "no_such_layer"}, {}, "target_modules"),
        ({"prior": "pictures"}, {}, "class prompt"),
        ({"optimizer_args": "[1"}, {}, "optimizer_args"),
        ({}, {"name": "../../outside"}, "under this name"),
    ],
)
def test_bad_settings_are_explained(
    client: Client, subject: str, settings: dict, knobs: dict, words: str
) -> None:
    g = Graph()
    training(g, tiny_parts(g, "sd15"), subject, **{"name": "http/bad", **knobs}, settings=settings)
    with pytest.raises(PromptFailed) as failed:
        client.run(g)
    assert words in failed.value.text


@pytest.mark.parametrize("folder", ["../models", "/etc", "nowhere"])
def test_folders_elsewhere_are_refused(client: Client, folder: str) -> None:
    g = Graph()
    training(g, tiny_parts(g, "sd15"), folder, "http/bad")
    with pytest.raises(PromptRejected, match="input folder"):
        client.run(g)
