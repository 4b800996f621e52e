"""Stage 1: pictures and captions from the npm package ``emoji-datasource-google`` (Noto emoji, Apache-2.0).

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python -m embedded.make.pictures package WORK

writes WORK/pictures.npy (uint8, [N, 64, 64, 3]), WORK/held.npy (the held-out concepts on white),
WORK/captions.json (a list of [caption, concept index or -1], and the names of the concepts), WORK/sprites.npy (uint8,
[M, 64, 64, 4]: every picture of the package but skin tones and the held-out concepts, for the autoencoder alone), and
the cut-out pictures of the held-out concepts into ../subjects. Deterministic.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import numpy as np
from PIL import Image

from embedded.captions import COLOURS, PAIR, PLACES, SIZE, caption, concepts, pair_caption
from embedded.pictures import SUBJECTS, compose, scaled, subjects, view

SKIN_TONE = re.compile("1f3f[b-f]")


def sprite(folder: Path, code: str) -> Image.Image:
    """The 64 x 64 RGBA picture of an emoji. Raises FileNotFoundError where the package has none."""
    picture = Image.open(folder / "img" / "google" / "64" / f"{code}.png").convert("RGBA")
    return picture if picture.size == (SIZE, SIZE) else picture.resize((SIZE, SIZE), Image.LANCZOS)


def all_sprites(folder: Path) -> np.ndarray:
    """Every picture of the package [M, 64, 64, 4] but skin tones and what resembles a held-out concept."""
    left_out = {c.code for c in concepts() if c.held} | {"2602-fe0f"}  # another umbrella
    paths = sorted((folder / "img" / "google" / "64").glob("*.png"))
    codes = [p.stem for p in paths if p.stem not in left_out and not SKIN_TONE.search(p.stem)]
    return np.stack([np.asarray(sprite(folder, code)) for code in codes])


def make(folder: Path, seed: int = 0) -> tuple[np.ndarray, list[tuple[str, int]], np.ndarray]:
    """All training pictures [N, 64, 64, 3] with (caption, concept index or -1), and the held-out ones."""
    rng = random.Random(seed)
    known = [c for c in concepts() if not c.held]
    sprites = {c.name: sprite(folder, c.code) for c in concepts()}
    pictures, captions = [], []

    def add(picture: np.ndarray, text: str, index: int) -> None:
        pictures.append(picture)
        captions.append((text, index))

    for index, concept in enumerate(known):
        art, colours = sprites[concept.name], sorted(COLOURS)
        # The plain pictures are what most prompts ask for: they stand in the list several times.
        for _ in range(8):
            add(view(art), caption(concept.name), index)
        for _ in range(2):
            add(view(art), concept.kind, -1)
            add(view(art, flip=True), caption(concept.name, mirrored=True), index)
        for colour in COLOURS:
            add(view(art, colour=colour), caption(concept.name, colour), index)
        for colour in rng.sample(colours, 2):
            add(view(art, flip=True, colour=colour), caption(concept.name, colour, mirrored=True), index)
        for place in PLACES:
            for colour in (None, *rng.sample(colours, 2)):
                shift = (rng.randint(0, 2) - 1, rng.randint(0, 2) - 1)
                add(view(art, colour=colour, place=place, shift=shift), caption(concept.name, colour, place), index)
        colour, place = rng.choice(colours), rng.choice(sorted(PLACES))
        add(view(art, colour=colour), caption(concept.kind, colour), -1)
        add(view(art, place=place), caption(concept.kind, None, place), -1)
        for _ in range(4):
            other = rng.choice([c for c in known if c is not concept])
            left, right = rng.sample([art, sprites[other.name]], 2)
            halves = [(scaled(left, PAIR), (0, 16)), (scaled(right, PAIR), (32, 16))]
            add(compose(halves), pair_caption(concept.name, other.name), -1)
    held = [view(sprites[c.name]) for c in concepts() if c.held]
    return np.stack(pictures), captions, np.stack(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    parser.add_argument("work", type=Path, help="folder for what the stages make")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    SUBJECTS.mkdir(exist_ok=True)
    for subject in subjects():
        sprite(options.package, subject.code).save(SUBJECTS / f"{subject.name.replace(' ', '_')}.png", optimize=True)
    pictures, captions, held = make(options.package)
    np.save(options.work / "pictures.npy", pictures)
    np.save(options.work / "held.npy", held)
    np.save(options.work / "sprites.npy", all_sprites(options.package))
    names = [c.name for c in concepts() if not c.held]
    (options.work / "captions.json").write_text(json.dumps({"captions": captions, "names": names}), "utf-8")
    print(f"{len(pictures)} pictures, {len({c for c, _ in captions})} captions, {len(held)} held out")


if __name__ == "__main__":
    main()
