"""Teach the tiny emoji model a subject that it never saw, through a running ComfyUI, and see what came of it.

The demo, the smoke test and `benchmarks/subject_bounds.py` use this. Pictures are compared as thumbnails of
16 x 16 px with values in 0..1: coarse, but independent of the model and of anything trained.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from embedded.captions import SIZE, Concept, caption, concepts
from embedded.model import build, is_current
from embedded.pictures import HELD_VIEWS, TRAIN_VIEWS, TRIGGER, prompt, subjects, views
from oft_core.rotation import block_size_of, cayley, pack_skew, unpack_skew

from .client import Client, Graph, Node
from .server import ComfyServer

CHECKPOINT = "oft_emoji.safetensors"
STEPS, CFG = 20, 3.0  # of a picture
# The training of the smoke test: short, and enough to see the subject.
# With so few steps a mean over the last ones says more than where the last one happened to end.
SMOKE = {"steps": 250, "learning_rate": 5e-3, "settings": {"ema": 0.98}}


def provide_checkpoint(models: Path) -> Path:
    """The tiny model among the checkpoints of a models folder; built once for the weights of this version."""
    path = models / "checkpoints" / CHECKPOINT
    return path if is_current(path) else build(path)


def subject(name: str) -> Concept:
    """The held-out subject of that name. Raises KeyError."""
    return {s.name: s for s in subjects()}[name]


def provide_pictures(server: ComfyServer, concept: Concept, name: str = "") -> str:
    """The five training views as PNG with their captions as .txt in a folder of the server's input; returns its name."""
    name = name or f"subject_{concept.name.replace(' ', '_')}"
    folder = server.input / name
    folder.mkdir(parents=True, exist_ok=True)
    for i, (picture, kind) in enumerate(zip(views(concept, TRAIN_VIEWS), TRAIN_VIEWS, strict=True)):
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption(prompt(concept), mirrored=kind[3]), "utf-8")
    return name


def train(
    server: ComfyServer, client: Client, concept: Concept, *, steps: int, seed: int = 0, name: str = "", **knobs: object
) -> Path:
    """Run Train OFT on the five views and return the adapter's file. `knobs` replace inputs of the two nodes."""
    g = Graph()
    base = g.CheckpointLoaderSimple(ckpt_name=CHECKPOINT)
    pictures = g.OFT_Dataset(
        folder=provide_pictures(server, concept), captions="", instance_prompt=f"[trigger] {concept.kind}",
        trigger=TRIGGER, class_prompt=concept.kind, resolution=SIZE,
    )  # fmt: skip
    settings = knobs.pop("settings", {})
    name = name or f"subjects/{concept.name.replace(' ', '_')}_{seed}"
    options = {
        "preset": "subject", "steps": steps, "learning_rate": 1e-3, "block_size": 32, "coft": "off",
        "coft_degrees": 15.0, "coft_eps": 6e-5, "seed": seed, "sample_prompts": "", "sample_every": 0,
        "save_every": 0, "low_vram": "off", "resume": False, "name": name, **knobs,
    }  # fmt: skip
    trained = g.OFT_Train(
        model=base[0], clip=base[1], vae=base[2], dataset=pictures, config=g.OFT_TrainConfig(**settings), **options
    )
    g.PreviewAny(source=trained[4])
    client.run(g, timeout=900)
    return max((server.models / "oft").glob(f"{name}_?????_.safetensors"))


def drawn(
    client: Client, prompts: list[tuple[str, int]], file: str | None = None, *, strength: float = 1.0, mode: str = "rotation"
) -> np.ndarray:
    """Pictures of (text, seed) pairs with an adapter file (by its name in the loader), uint8 [N, 64, 64, 3]."""
    g = Graph()
    base: Node | list = g.CheckpointLoaderSimple(ckpt_name=CHECKPOINT)
    model = base[0]
    if file is not None:
        model = g.OFT_LoadModelOnly(model=model, oft_name=file, strength_model=strength, mode=mode, coft="file")[0]
    negative = g.CLIPTextEncode(clip=base[1], text="")
    latent = g.EmptySD3LatentImage(width=SIZE, height=SIZE, batch_size=1)
    shown = []
    for text, seed in prompts:
        samples = g.KSampler(
            model=model, positive=g.CLIPTextEncode(clip=base[1], text=text), negative=negative, latent_image=latent,
            seed=seed, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="simple", denoise=1.0,
        )  # fmt: skip
        shown.append(g.PreviewImage(images=g.VAEDecode(samples=samples, vae=base[2])))
    result = client.run(g, timeout=600)
    return np.stack([result.image(node) for node in shown])


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """uint8 [N, 64, 64, 3] -> float64 [N, 16 * 16 * 3] in 0..1."""
    small = pictures.reshape(len(pictures), 16, 4, 16, 4, 3).astype(np.float64).mean((2, 4))
    return small.reshape(len(pictures), -1) / 255


def likeness(pictures: np.ndarray, concept: Concept) -> float:
    """How much pictures are like one subject and not just like any: -1..1, the mean over the pictures.

    Thumbnails are compared by their difference from the mean of all subjects' views that were not trained on: the
    cosine with the most similar view of the subject. A pale or blurred blob in the middle is like none of them.
    """
    real = {s.name: thumbnails(np.stack(views(s, HELD_VIEWS))) for s in subjects()}
    middle = np.concatenate(list(real.values())).mean(0)

    def normed(x: np.ndarray) -> np.ndarray:
        x = x - middle
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)

    return float((normed(thumbnails(pictures)) @ normed(real[concept.name]).T).max(1).mean())


def drift(pictures: np.ndarray, base: np.ndarray) -> float:
    """Root mean squared difference of thumbnails to the base model's of the same captions and seeds; the mean."""
    gap = thumbnails(pictures) - thumbnails(base)
    return float(np.sqrt((gap**2).mean(-1)).mean())


def subject_prompts(concept: Concept, count: int = 6) -> list[tuple[str, int]]:
    return [(prompt(concept), 300 + i) for i in range(count)]


def other_prompts(count: int = 12) -> list[tuple[str, int]]:
    """Captions of known things spread over all classes."""
    known = [c for c in concepts() if not c.held]
    return [(caption(c.name), 500 + i) for i, c in enumerate(known[:: len(known) // count][:count])]


def random_like(file: Path, target: Path, seed: int) -> Path:
    """A file that turns every block by the same angles as `file`, but in random planes.

    Each generator Q becomes S Q S^T with a random orthogonal S: the spectrum stays, the directions do not.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for key, value in tensors.items():
        if not key.endswith("oft_R.weight"):
            continue
        skew = unpack_skew(value.double(), block_size_of(value.shape[1]))
        noise = torch.randn(skew.shape, generator=generator, dtype=torch.float64)
        turn = cayley(noise - noise.transpose(1, 2))
        tensors[key] = pack_skew(turn @ skew @ turn.transpose(1, 2)).to(value.dtype).contiguous()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata)
    return target
