"""Stage 4: how good the shipped model is, measured through stock ComfyUI nodes over HTTP.

    python -m embedded.make.evaluate WORK HOST_DIR [--sheet docs/images/emoji.jpg]

run with the host's Python, from the repository. Every picture: CheckpointLoaderSimple, CLIPTextEncode, EmptySD3LatentImage
64 x 64, KSampler (euler, simple, 20 steps, cfg 3), VAEDecode. Prints and writes WORK/evaluation.json:

nearest     share of 200 seen captions whose picture is nearest (pixels) to its own of the 200
mirrored    share of 60 pictures "mirrored X" that are nearer to the mirrored picture of X than to the plain one
background  share of 96 pictures "X on a COLOUR background" whose border has that colour
place       share of 60 pictures "small X, PLACE" whose thing is at that place
psnr        reconstruction of the 24 held-out pictures through VAEEncode and VAEDecode, dB, mean over the pictures;
            psnr_pooled: from the mean squared error of all of them, which the worst pictures rule
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dev.client import Client, Graph
from dev.server import ComfyServer
from embedded.captions import COLOURS, PLACES, SIZE, SMALL, WHITE, caption, concepts
from embedded.model import build

CHECKPOINT = "oft_emoji.safetensors"
CFG, STEPS = 3.0, 20


def draw(client: Client, prompts: list[tuple[str, int]]) -> np.ndarray:
    """Pictures of (text, seed) pairs, uint8 [N, 64, 64, 3]."""
    pictures = []
    for start in range(0, len(prompts), 20):
        g = Graph()
        checkpoint = g.CheckpointLoaderSimple(ckpt_name=CHECKPOINT)
        negative = g.CLIPTextEncode(clip=checkpoint[1], text="")
        latent = g.EmptySD3LatentImage(width=SIZE, height=SIZE, batch_size=1)
        shown = []
        for text, seed in prompts[start : start + 20]:
            samples = g.KSampler(
                model=checkpoint[0], positive=g.CLIPTextEncode(clip=checkpoint[1], text=text), negative=negative,
                latent_image=latent, seed=seed, steps=STEPS, cfg=CFG, sampler_name="euler", scheduler="simple",
                denoise=1.0,
            )  # fmt: skip
            shown.append(g.PreviewImage(images=g.VAEDecode(samples=samples, vae=checkpoint[2])))
        result = client.run(g, timeout=600)
        pictures += [result.image(node) for node in shown]
    return np.stack(pictures)


def background(picture: np.ndarray) -> str:
    """The palette's name of the median colour of a picture's border ("white" included)."""
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    median = np.median(edge.astype(float), axis=0)
    palette = {**COLOURS, "white": WHITE}
    return min(palette, key=lambda name: np.abs(median - palette[name]).sum())


def place(picture: np.ndarray) -> str:
    """Where the thing on a plain background is: the place whose centre is nearest to its centre of mass."""
    edge = np.median(np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]), axis=0)
    weight = np.clip(np.abs(picture.astype(float) - edge).sum(-1) - 60, 0, None)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    total = max(weight.sum(), 1e-9)
    x, y = (weight * columns).sum() / total, (weight * rows).sum() / total
    middle = {name: (px + SMALL / 2, py + SMALL / 2) for name, (px, py) in PLACES.items()}
    return min(middle, key=lambda name: (middle[name][0] - x) ** 2 + (middle[name][1] - y) ** 2)


def distances(drawn: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Squared distance of pixels in 0..1 between all drawn [N, H, W, 3] and all real [M, H, W, 3] pictures: [N, M]."""
    one, other = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (drawn, real))
    return (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T


def reconstruction(client: Client, server: ComfyServer, held: np.ndarray) -> dict[str, float]:
    """PSNR in dB of pictures [N, 64, 64, 3] through the stock VAE nodes: mean over pictures, and pooled."""
    g = Graph()
    vae = g.CheckpointLoaderSimple(ckpt_name=CHECKPOINT)[2]
    shown = []
    for i, picture in enumerate(held):
        Image.fromarray(picture).save(server.input / f"held{i}.png")
        pixels = g.LoadImage(image=f"held{i}.png")
        latent = g.VAEEncode(pixels=pixels, vae=vae)
        shown.append(g.PreviewImage(images=g.VAEDecode(samples=latent, vae=vae)))
    result = client.run(g, timeout=600)
    again = np.stack([result.image(node) for node in shown])
    error = (((again.astype(np.float64) - held) / 255) ** 2).mean((1, 2, 3))
    return {"psnr": float(-10 * np.log10(error).mean()), "psnr_pooled": float(-10 * np.log10(error.mean()))}


def sheet(prompts: list[tuple[str, int]], pictures: np.ndarray, path: Path) -> None:
    """A contact sheet, twice the size, eight in a row, each with its prompt."""
    font, size, line = ImageFont.load_default(11), 2 * SIZE, 30
    rows = -(-len(pictures) // 8)
    out = Image.new("RGB", (8 * (size + 8) + 8, rows * (size + line) + 8), "white")
    pen = ImageDraw.Draw(out)
    for i, ((text, _), picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = 8 + i % 8 * (size + 8), 8 + i // 8 * (size + line)
        out.paste(Image.fromarray(picture).resize((size, size), Image.LANCZOS), (x, y))
        words, first = text.split(), ""
        while words and pen.textlength(f"{first} {words[0]}", font) < size:
            first = f"{first} {words.pop(0)}".strip()
        pen.text((x, y + size), f"{first}\n{' '.join(words)}", "black", font, spacing=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save(path, quality=88)


def sheet_prompts() -> list[tuple[str, int]]:
    """48 prompts of things chosen at random: 24 plain, 12 with a background, 12 small ones at a place."""
    names = random.Random(4).sample([c.name for c in concepts() if not c.held], 48)
    colours, places = sorted(COLOURS), sorted(PLACES)
    texts = [caption(n) for n in names[:24]]
    texts += [caption(n, colours[i % 8]) for i, n in enumerate(names[24:36])]
    texts += [caption(n, colours[i % 8] if i % 2 else None, places[i % 5]) for i, n in enumerate(names[36:])]
    return [(text, 1000 + i) for i, text in enumerate(texts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("host_dir", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--only-sheet", action="store_true")
    options = parser.parse_args()
    listed = json.loads((options.work / "captions.json").read_text("utf-8"))
    everything = np.load(options.work / "pictures.npy", mmap_mode="r")
    first = {}
    for i, (text, index) in enumerate(listed["captions"]):
        if index >= 0:
            first.setdefault(text, i)
    rng = random.Random(1)
    names = rng.sample(listed["names"], 200)
    found: dict[str, float] = {}
    server = ComfyServer(options.host_dir, options.work / "server", test_pack=False)
    build(server.models / "checkpoints" / CHECKPOINT)
    with server:
        client = server.client()
        if options.sheet:
            prompts = sheet_prompts()
            sheet(prompts, draw(client, prompts), options.sheet)
        if not options.only_sheet:
            real = np.stack([everything[first[name]] for name in names])
            found |= reconstruction(client, server, np.load(options.work / "held.npy"))
            print(found, flush=True)
            drawn = draw(client, [(name, 7000 + i) for i, name in enumerate(names)])
            np.save(options.work / "drawn.npy", drawn)
            found["nearest"] = float((distances(drawn, real).argmin(1) == np.arange(len(names))).mean())
            print(found, flush=True)
            asked = [(name, colour) for name, colour in zip(names[:96], sorted(COLOURS) * 12, strict=True)]
            drawn = draw(client, [(caption(n, c), 8000 + i) for i, (n, c) in enumerate(asked)])
            found["background"] = float(np.mean([background(p) == c for p, (_, c) in zip(drawn, asked, strict=True)]))
            placed = [(name, where) for name, where in zip(names[96:156], sorted(PLACES) * 12, strict=True)]
            drawn = draw(client, [(caption(n, None, w), 9000 + i) for i, (n, w) in enumerate(placed)])
            found["place"] = float(np.mean([place(p) == w for p, (_, w) in zip(drawn, placed, strict=True)]))
            # Things that look much the same from both sides would say nothing.
            lopsided = sorted(range(len(names)), key=lambda i: -np.abs(real[i] - real[i][:, ::-1].astype(float)).sum())[:60]
            drawn = draw(client, [(caption(names[i], mirrored=True), 9500 + i) for i in lopsided])
            two_ways = (np.stack([real[i][:, ::-1], real[i]]) for i in lopsided)
            gaps = [distances(p[None], both)[0] for p, both in zip(drawn, two_ways, strict=True)]
            found["mirrored"] = float(np.mean([there < here for there, here in gaps]))
            (options.work / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            print(found)


if __name__ == "__main__":
    main()
