"""Pictures and captions: reading, aspect-ratio buckets, and an order that is a pure function of the seed.

Needs Pillow for reading pictures (ComfyUI has it); everything else is plain Python. What a host caches for a record (latents, text
embeddings) is its own business; ``Record`` says what there is to cache.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError
from .seeds import generator

#: Stands for the trigger word in captions.
TRIGGER = "[trigger]"
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
#: What systems keep in folders of pictures, besides names that begin with a dot.
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Record:
    """One training example.

    name: file path or any label that is unique in the set.   caption.   bucket: (width, height) in pixels that it is fitted to.
    repeats: how often it is seen an epoch.   flip: mirrored copy.   has_mask: a mask goes with it.   role: ``instance`` or ``class``.
    """

    name: str
    caption: str
    bucket: tuple[int, int]
    repeats: int = 1
    flip: bool = False
    has_mask: bool = False
    role: str = "instance"


# -------------------------------------------------------------------- buckets


def make_buckets(resolution: int, step: int = 64, longest: float = 2.0) -> list[tuple[int, int]]:
    """All (width, height) that are multiples of ``step``, no larger than resolution^2 pixels, no longer than ``longest`` to 1, and not
    smaller than another of the same width or height. Raises ConfigError if the resolution is below the step."""
    if resolution < step or step < 1 or longest < 1:
        raise ConfigError("These bucket settings leave no bucket", found=f"resolution {resolution}, step {step}", expected=f">= {step}")
    found: set[tuple[int, int]] = set()
    width = step
    while width <= resolution * math.sqrt(longest):
        height = min(resolution * resolution // width, int(resolution * math.sqrt(longest))) // step * step
        if height >= step and max(width, height) <= longest * min(width, height):
            found |= {(width, height), (height, width)}
        width += step
    return sorted(found) or [(resolution // step * step,) * 2]


def nearest_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose shape is nearest to (width, height), the larger one of two equal shapes."""
    want = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - want), -b[0] * b[1]))


# -------------------------------------------------------------------- reading


def find_pictures(folder: str | os.PathLike) -> list[Path]:
    """Picture files directly in the folder, sorted by name; not hidden ones, such as macOS's "._a.jpg".

    Raises ConfigError if there is none.
    """
    files = _files(folder)
    found = [p for p in files if p.suffix.lower() in PICTURES]
    if not found:
        others = ", ".join(p.name for p in files[:5])
        raise ConfigError(
            "The folder holds no pictures", file=folder, found=others or None, expected="files ending in " + ", ".join(PICTURES)
        )
    return found


def left_out(folder: str | os.PathLike) -> list[Path]:
    """Files directly in the folder that are neither pictures of a known kind nor captions, sorted by name.

    Raises ConfigError if there is no such folder.
    """
    return [p for p in _files(folder) if p.suffix.lower() not in (*PICTURES, ".txt") and p.name.lower() not in _OF_THE_SYSTEM]


def _files(folder: str | os.PathLike) -> list[Path]:
    """Files directly in the folder, sorted by name, without hidden ones."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError("There is no such folder", file=folder)
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())


def caption_of(picture: Path, prompt: str = "", trigger: str = "") -> str:
    """The text of ``name.txt`` beside the picture (one line), else ``prompt``; [trigger] stands for the trigger word.

    A trigger that a caption does not mention is put in front of it. Raises ConfigError for a text that is neither UTF-8 nor
    UTF-16 with its mark.
    """
    beside = caption_beside(picture)
    return with_trigger(prompt if beside is None else beside, trigger)


def caption_beside(picture: Path) -> str | None:
    """The text of ``name.txt`` beside the picture as one line, None without that file. Raises ConfigError as ``caption_of``."""
    beside = picture.with_suffix(".txt")
    return " ".join(_read_text(beside).split()) if beside.is_file() else None


def filled(text: str, trigger: str) -> str:
    """The text with the trigger word for [trigger], as one line then; a text without [trigger] as it is."""
    return " ".join(text.replace(TRIGGER, trigger).split()) if TRIGGER in text else text


def with_trigger(text: str, trigger: str) -> str:
    """One line with the trigger word for [trigger], and in front where the text does not mention it as a word of its own."""
    text = " ".join(text.replace(TRIGGER, trigger).split())
    if not trigger:
        return text
    # "sks" is not in "desks". Scripts without spaces between words have no such edges.
    edges = (r"(?<![A-Za-z0-9_])", r"(?![A-Za-z0-9_])")
    before, after = (edge if re.match("[A-Za-z0-9_]", end) else "" for edge, end in zip(edges, (trigger[0], trigger[-1]), strict=True))
    if re.search(before + re.escape(trigger) + after, text):
        return text
    return f"{trigger}, {text}" if text else trigger


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return raw.decode("utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "This caption cannot be read", file=path, found=str(error), expected="UTF-8 text", hint="Save it as UTF-8 in your editor."
        ) from error


def _eight_bits(picture):
    """Grey pictures of 16 bits as "L": Pillow's own conversion cuts everything above 255 off."""
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if picture.mode == "I" and values.max() <= 255:  # eight bits, kept in 32
        return picture.convert("L")
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values from {values.min()} to {values.max()}")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def open_picture(path: str | os.PathLike):
    """(RGB picture upright by its EXIF orientation, alpha as an "L" picture or None), as Pillow images.

    Of several frames the first. Fully opaque alpha counts as none. Raises ConfigError if Pillow cannot read the file, if it has more
    pixels than Pillow opens, or if its values are no grey or colour of 8 or 16 bits.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            if file.mode == "F":
                raise ValueError("grey values in floating point, of which no range is known")
            picture = _eight_bits(ImageOps.exif_transpose(file))
            has_alpha = "A" in picture.getbands() or "transparency" in picture.info
            picture = picture.convert("RGBA" if has_alpha else "RGB")
    except Image.DecompressionBombError as error:
        raise ConfigError(
            "This picture has too many pixels to be opened", file=path, found=str(error), expected=f"at most {2 * Image.MAX_IMAGE_PIXELS}",
            hint="Scale it down; training uses far fewer.",
        ) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError("This picture cannot be read", file=path, found=str(error)) from error
    if not has_alpha:
        return picture, None
    alpha = picture.getchannel("A")
    return picture.convert("RGB"), None if alpha.getextrema()[0] == 255 else alpha


def fitted(picture, bucket: tuple[int, int], flip: bool = False):
    """The picture scaled to cover the bucket and cut in the middle, mirrored if ``flip``. Pillow image in, Pillow image out."""
    from PIL import Image

    width, height = picture.size
    scale = max(bucket[0] / width, bucket[1] / height)
    size = max(bucket[0], round(width * scale)), max(bucket[1], round(height * scale))
    kind = Image.Resampling.LANCZOS if picture.mode == "RGB" else Image.Resampling.BILINEAR
    left, top = (size[0] - bucket[0]) // 2, (size[1] - bucket[1]) // 2
    out = picture.resize(size, kind).crop((left, top, left + bucket[0], top + bucket[1]))
    return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else out


def to_tensor(picture) -> Tensor:
    """Pillow image -> float32 (height, width, channels), 0..1 (ComfyUI's IMAGE layout without the batch)."""
    array = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None])


def load(path: str | os.PathLike, record: Record) -> tuple[Tensor, Tensor | None]:
    """A record's picture (height, width, 3) and mask (height, width, 1) or None, fitted to its bucket."""
    picture, alpha = open_picture(path)
    image = to_tensor(fitted(picture, record.bucket, record.flip))
    return image, None if alpha is None else to_tensor(fitted(alpha, record.bucket, record.flip))


def folder_records(
    folder: str | os.PathLike, resolution: int, *, prompt: str = "", trigger: str = "", step: int = 64, longest: float = 2.0,
    repeats: int = 1, flips: bool = False, square: bool = False, role: str = "instance",
) -> list[Record]:
    """A record for every picture of a folder (and its mirror image, with ``flips``). ``square``: one square bucket for all."""
    if repeats < 1:
        raise ConfigError("Option 'repeats' is out of range", found=repeats, expected="1 or more")
    buckets = [(resolution // step * step,) * 2] if square else make_buckets(resolution, step, longest)
    records = []
    for path in find_pictures(folder):
        picture, alpha = open_picture(path)
        bucket = nearest_bucket(picture.size, buckets)
        caption = caption_of(path, prompt, trigger)
        for flip in (False, True) if flips else (False,):
            records.append(Record(str(path), caption, bucket, repeats, flip, alpha is not None, role))
    return records


# -------------------------------------------------------------------- order


class Order:
    """Which records are seen when: an endless list of batches, the same for the same records, batch size and seed.

    Every epoch is one shuffle of all records (with repeats). A batch holds records of one bucket and is given out when it is full;
    what is left over in a bucket waits for the next epoch, so nothing is dropped and every batch is whole. With one bucket, n
    batches of 1 are exactly one batch of n.
    """

    def __init__(self, records: Sequence[Record], batch_size: int, seed: int):
        if not records:
            raise ConfigError("There are no pictures to train on")
        self.records = list(records)
        self.batch_size = batch_size
        self.seed = seed
        self._index = [i for i, r in enumerate(self.records) for _ in range(r.repeats)]
        self._batches: list[tuple[int, ...]] = []
        self._stream = self._generate()

    def _generate(self) -> Iterator[tuple[int, ...]]:
        waiting: dict[tuple[int, int], list[int]] = {}
        epoch = 0
        while True:
            for k in torch.randperm(len(self._index), generator=generator(self.seed, "order", epoch)).tolist():
                i = self._index[k]
                queue = waiting.setdefault(self.records[i].bucket, [])
                queue.append(i)
                if len(queue) == self.batch_size:
                    yield tuple(queue)
                    queue.clear()
            epoch += 1

    def batch(self, number: int) -> list[Record]:
        """Batch ``number`` (0, 1, ...) of the endless list."""
        while len(self._batches) <= number:
            self._batches.append(next(self._stream))
        return [self.records[i] for i in self._batches[number]]
