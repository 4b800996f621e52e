"""``python -m embedded FILE``: write the tiny model as a checkpoint for ComfyUI."""

import argparse
from pathlib import Path

from .model import build

parser = argparse.ArgumentParser(prog="python -m embedded", description=__doc__)
parser.add_argument("file", type=Path, help="for example ComfyUI/models/checkpoints/oft_emoji.safetensors")
print("Wrote", build(parser.parse_args().file))
