"""The demo: a subject that a tiny pretrained model never saw, taught by Train OFT, drawn by a real ComfyUI.

Started by ``dev/run.py demo`` with the host's Python: python -m dev.demo HOST_DIR MODELS_DIR CACHE_DIR
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from embedded.pictures import SUBJECTS, TRAIN_VIEWS, prompt, views

from .client import Graph, PromptFailed, PromptRejected
from .oft_files import write_random_oft
from .server import ComfyServer, ServerError
from .subjects import CHECKPOINT, drawn, provide_checkpoint, provide_pictures, subject

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 1.5)
MODES = ("rotation", "geodesic", "linear")  # ComfyUI's own loader does not read such a file, so no "core"
SUBJECT = "koala"
OFT_FILE = "koala_oft.safetensors"  # made by Train OFT from five pictures; see embedded/README.md
OTHERS = ("penguin", "red apple", "skull on a pink background", "small magnet, left", "dog", "snowman")
SEED = 303
# What the example workflows ask for -> the tiny file that stands in for it.
STAND_INS = {
    "checkpoints/sd15.safetensors": "checkpoints/tiny_sd15.safetensors",
    "diffusion_models/sd15_unet.safetensors": "checkpoints/tiny_sd15.safetensors",
}
EXAMPLE_OFT_FILE = "my_subject_oft.safetensors"
EXAMPLE_STYLE_FILE = "my_style_oft.safetensors"  # a second file, other blocks, no text encoder
EXAMPLE_PICTURES = "my_subject"  # folder of training pictures
SIZE = 128  # pixels of one picture on the sheet


def provide_example_files(server: ComfyServer, models: Path) -> None:
    """Give the tiny models the names that the example workflows use, and make the files that they load."""
    for name, tiny in STAND_INS.items():
        target = server.models / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            try:
                target.symlink_to(models / tiny)
            except OSError:  # symlinks may be forbidden on Windows
                shutil.copyfile(models / tiny, target)
    for folder in ("oft", "loras"):  # one example loads it with ComfyUI's own LoRA loader
        write_random_oft(
            models / "checkpoints" / "tiny_sd15.safetensors", server.models / folder / EXAMPLE_OFT_FILE
        )
    write_random_oft(
        models / "checkpoints" / "tiny_sd15.safetensors",
        server.models / "oft" / EXAMPLE_STYLE_FILE,
        block_size=64,
        text_encoder=False,
        seed=1,
    )
    provide_checkpoint(server.models)
    provide_pictures(server, subject(SUBJECT), SUBJECT)
    pictures = server.input / EXAMPLE_PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(("orange", "teal", "purple")):
        Image.new("RGB", (96, 64 + 32 * i), colour).save(pictures / f"{i}.png")


def draw_sheet(
    cells: dict[tuple[str, float], np.ndarray], others: tuple[np.ndarray, np.ndarray], path: Path
) -> None:
    """One PNG: the training pictures, a row for each mode and a column for each strength, and other captions."""
    big, small = (ImageFont.load_default(size) for size in (15, 12))
    gap, left, line = 10, 96, 18
    step, width = SIZE + gap, 96 + 6 * (SIZE + gap) + gap
    mode_top = 40 + SIZE + 58
    other_top = mode_top + len(MODES) * step + 48
    sheet = Image.new("RGB", (width, other_top + 2 * step + line), "white")
    draw = ImageDraw.Draw(sheet)

    def cell(column: int, y: int, picture: np.ndarray) -> None:
        shown = Image.fromarray(picture).resize((SIZE, SIZE), Image.LANCZOS)
        sheet.paste(shown, (left + column * step, y))

    draw.text((gap, gap), f"The {len(TRAIN_VIEWS)} pictures of a {SUBJECT} that the model was shown, as 'zwx animal'", "black", big)
    for column, picture in enumerate(views(subject(SUBJECT))):
        cell(column, 40, picture)
    draw.text((gap, mode_top - 44), "'zwx animal', one seed: rows are strength rules, columns are strengths", "black", big)
    for column, strength in enumerate(STRENGTHS):
        draw.text((left + column * step, mode_top - 20), f"strength {strength:g}", "black", small)
    for row, mode in enumerate(MODES):
        y = mode_top + row * step
        draw.text((gap, y + SIZE // 2 - 8), mode, "black", big)
        for column, strength in enumerate(STRENGTHS):
            cell(column, y, cells[mode, strength])
    draw.text((gap, other_top - 26), "Other captions: without OFT, and with it at strength 1", "black", big)
    for row, (name, pictures) in enumerate(zip(("without", "with"), others, strict=True)):
        y = other_top + row * step
        draw.text((gap, y + SIZE // 2 - 8), name, "black", big)
        for column, picture in enumerate(pictures):
            cell(column, y, picture)
    for column, text in enumerate(OTHERS):
        draw.text((left + column * step, other_top + 2 * step - gap + 2), text.replace(" on a pink background", ", pink"), "#444", small)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def run_demo(server: ComfyServer, out: Path) -> None:
    """Draw all pictures over HTTP and save the sheet."""
    client = server.client()
    shutil.copyfile(SUBJECTS / OFT_FILE, server.models / "oft" / OFT_FILE)
    g = Graph()
    base = g.CheckpointLoaderSimple(ckpt_name=CHECKPOINT)
    loader = g.OFT_LoadModelOnly(model=base[0], oft_name=OFT_FILE, strength_model=1.0, mode="rotation", coft="file")
    g.PreviewAny(source=loader[0])
    text = client.run(g).text(loader)
    begun = time.monotonic()
    cells = {}
    for mode in MODES:
        for strength in STRENGTHS:
            asked = [(prompt(subject(SUBJECT)), SEED)]
            cells[mode, strength] = drawn(client, asked, OFT_FILE, strength=strength, mode=mode)[0]
        print(f"  {mode}: {len(STRENGTHS)} pictures ({time.monotonic() - begun:.0f} s)", flush=True)
    captions = [(text, SEED) for text in OTHERS]
    draw_sheet(cells, (drawn(client, captions), drawn(client, captions, OFT_FILE)), out)
    print("\nWhat Load OFT says about the file at strength 1:\n")
    print("\n".join("    " + line for line in text.splitlines()))
    print(f"\nSheet of {len(cells) + 2 * len(OTHERS)} pictures: {out}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo")
    parser.add_argument("host_dir", type=Path)
    parser.add_argument("models_dir", type=Path)
    parser.add_argument("cache_dir", type=Path)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # A terminated demo must still stop its server: turn the signal into an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("Starting ComfyUI ...", flush=True)
    work = options.cache_dir / "demo"
    server = ComfyServer(options.host_dir, work, models_dir=options.models_dir, port=options.port)
    try:
        with server:
            print(f"ComfyUI answers at {server.url} after {server.seconds_to_start:.0f} s.", flush=True)
            provide_example_files(server, options.models_dir)
            run_demo(server, options.out or work / "demo.png")
            if options.serve:
                print(f"\nOpen {server.url} - Ctrl-C ends it.")
                print("Example graphs: Templates > comfyui-oft. Or double-click the canvas and type 'oft'.")
                print(f"The tiny model is {CHECKPOINT}: draw at 64 x 64. The other tiny models are random, so")
                print(f"their pictures are patterns; put real models into {server.models} to see more.", flush=True)
                server.wait()
            else:
                print(f"The page was at {server.url}; run with --serve to keep it open.", flush=True)
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)
    except (ServerError, PromptRejected, PromptFailed) as fault:
        print(f"\nThe demo failed: {fault}\nServer log: {server.log}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
