"""The demo: one OFT file, four strength rules, four strengths, drawn by a real ComfyUI into one sheet.

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

from .client import Graph, PromptFailed, PromptRejected
from .oft_files import write_random_oft
from .server import ComfyServer, ServerError
from .workflows import stock_parts, text_to_image

STRENGTHS = (-1.0, 0.0, 0.5, 1.0)
MODES = ("rotation", "geodesic", "linear", "core")
OFT_FILE = "demo_oft.safetensors"
# What the example workflows ask for -> the tiny file that stands in for it.
STAND_INS = {
    "checkpoints/sd15.safetensors": "checkpoints/tiny_sd15.safetensors",
    "diffusion_models/sd15_unet.safetensors": "checkpoints/tiny_sd15.safetensors",
}
EXAMPLE_OFT_FILE = "my_subject_oft.safetensors"
EXAMPLE_STYLE_FILE = "my_style_oft.safetensors"  # a second file, other blocks, no text encoder
EXAMPLE_PICTURES = "my_subject"  # folder of training pictures
SIZE = 192  # pixels of one picture


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
    write_random_oft(
        models / "checkpoints" / "tiny_sd15.safetensors", server.models / "oft" / EXAMPLE_OFT_FILE
    )
    write_random_oft(
        models / "checkpoints" / "tiny_sd15.safetensors",
        server.models / "oft" / EXAMPLE_STYLE_FILE,
        block_size=64,
        text_encoder=False,
        seed=1,
    )
    pictures = server.input / EXAMPLE_PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(("orange", "teal", "purple")):
        Image.new("RGB", (96, 64 + 32 * i), colour).save(pictures / f"{i}.png")


def draw_sheet(base: np.ndarray, cells: dict[tuple[str, float], np.ndarray], path: Path) -> None:
    """One PNG: the base picture on the left, then a row for each mode and a column for each strength."""
    big, small = (ImageFont.load_default(size) for size in (15, 12))
    gap, left, top, line = 10, 92, 58, 18
    step_x, step_y = SIZE + gap, SIZE + line + gap
    columns, rows = len(STRENGTHS) + 1, len(MODES)
    sheet = Image.new("RGB", (left + columns * step_x + gap, top + rows * step_y + gap), "white")
    draw = ImageDraw.Draw(sheet)
    title = "One OFT file on a tiny random SD1.5 model: rows are strength rules, columns are strengths"
    draw.text((gap, gap), title, "black", big)

    def cell(column: int, row: int, picture: np.ndarray, note: str) -> None:
        x, y = left + column * step_x, top + row * step_y
        sheet.paste(Image.fromarray(picture), (x, y))
        draw.text((x, y + SIZE + 1), note, "#444", small)

    draw.text((left, top - 22), "no OFT", "black", big)
    for column, strength in enumerate(STRENGTHS, 1):
        draw.text((left + column * step_x, top - 22), f"strength {strength:g}", "black", big)
    for row, mode in enumerate(MODES):
        draw.text((gap, top + row * step_y + SIZE // 2), mode, "black", big)
        cell(0, row, base, "base picture")
        for column, strength in enumerate(STRENGTHS, 1):
            picture = cells[mode, strength]
            change = np.abs(picture.astype(int) - base).mean()
            note = "same as base" if not change else f"mean change {change:.1f} of 255"
            cell(column, row, picture, note)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def run_demo(server: ComfyServer, models: Path, out: Path) -> None:
    """Draw all pictures over HTTP and save the sheet."""
    client = server.client()
    checkpoint = models / "checkpoints" / "tiny_sd15.safetensors"
    layers = write_random_oft(checkpoint, server.models / "oft" / OFT_FILE, degrees=25)
    print(f"Made {OFT_FILE}: random rotations for {layers} layers of a tiny SD1.5 model.", flush=True)

    def draw(mode: str | None, strength: float) -> tuple[np.ndarray, str]:
        g = Graph()
        parts = stock_parts(g, "sd15")
        loader = None
        if mode is not None:
            loader = g.OFT_Load(
                model=parts.model,
                clip=parts.clip,
                oft_name=OFT_FILE,
                strength_model=strength,
                strength_clip=strength,
                mode=mode,
                coft="file",
            )
            parts = parts._replace(model=loader[0], clip=loader[1])
        preview = text_to_image(g, parts, "sd15", size=SIZE, steps=4, cfg=2.0)
        result = client.run(g, timeout=300)
        return result.image(preview), result.text(loader) if loader else ""

    begun = time.monotonic()
    base, _ = draw(None, 0.0)
    cells, report = {}, ""
    for mode in MODES:
        for strength in STRENGTHS:
            cells[mode, strength], text = draw(mode, strength)
            report = text if (mode, strength) == ("rotation", 1.0) else report
        print(f"  {mode}: {len(STRENGTHS)} pictures ({time.monotonic() - begun:.0f} s)", flush=True)
    draw_sheet(base, cells, out)
    print("\nWhat Load OFT says about the file at strength 1:\n")
    print("\n".join("    " + line for line in report.splitlines()))
    print(f"\nSheet of {len(cells) + 1} pictures: {out}", flush=True)


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
            run_demo(server, options.models_dir, options.out or work / "demo.png")
            if options.serve:
                print(f"\nOpen {server.url} - Ctrl-C ends it.")
                print("Example graphs: Templates > comfyui-oft. Or double-click the canvas and type 'oft'.")
                print("The tiny model is random, so its pictures are patterns; put real models into")
                print(f"{server.models} to see more.", flush=True)
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
