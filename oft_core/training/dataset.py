"""A set of training pictures: where they are, how each is fitted to its size bucket, and its captions.

Latents and text embeddings depend on the model and are made by the host. Needs Pillow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from . import data
from .data import Record
from .errors import ConfigError
from .folder import read, scan, some
from .pictures import MASK_FILE, Picture, fitted, spread, to_tensor


@dataclass(frozen=True)
class TrainingSet:
    """Training examples and where their pictures are.

    records: what is shown, mirror images included.   pictures: name -> Pillow picture and mask ("L") or None, for
    those that the host gave; others are files.   digest: changes when any pixel, mask or caption does.
    """

    records: tuple[Record, ...]
    pictures: dict[str, tuple[Any, Any]]
    class_prompt: str
    trigger: str
    resolution: int
    digest: str
    notes: tuple[str, ...]

    def load(self, record: Record) -> tuple[Tensor, Tensor | None]:
        """Picture (height, width, 3) and mask (height, width, 1) or None of a record, float32 0..1, fitted."""
        if record.name not in self.pictures:
            return data.load(record.name, record)
        picture, mask = self.pictures[record.name]
        image = to_tensor(fitted(picture, record.bucket, record.flip))
        if mask is None:
            return image, None
        return image, to_tensor(fitted(mask, record.bucket, record.flip))

    @property
    def main_bucket(self) -> tuple[int, int]:
        """The size that most pictures have, (width, height); the larger of two equally common ones."""
        count = Counter(r.bucket for r in self.records)
        return max(count, key=lambda b: (count[b], b[0] * b[1], b))


def build(
    *, pictures: Sequence[Picture] | None = None, folder: str | os.PathLike | None = None, masks: Sequence[Any] | None = None,
    mask_is: tuple[str, str] = MASK_FILE, masks_are: str = "given", captions: Sequence[str] | None = None, instance_prompt: str = "",
    trigger: str = "", class_prompt: str = "", resolution: int = 512, buckets: bool = True, bucket_step: int = 64, repeats: int = 1,
    flips: bool = False,
) -> TrainingSet:
    """A set of the given pictures, or of a folder as ``folder.scan`` reads it.

    masks: Pillow "L" pictures, one for all or one each in order, in place of the pictures' own; mask_is: see ``Picture``;
    masks_are: how a host says that there are some.   captions: one a picture, in order; for those without one, see
    ``data.make_records``.   buckets: off for squares.

    Raises ConfigError (no pictures, both sources, more captions or masks than pictures, unreadable files, or pictures of which
    nothing counts).
    """
    trigger = trigger.strip()
    if (pictures is None) == (folder is None):
        raise ConfigError("Give pictures or a folder", found="neither" if folder is None else "both")
    notes: list[str] = []
    if pictures is not None:
        given, count = iter(pictures), len(pictures)
    else:
        found = scan(folder)
        notes += found.notes
        beside = [p.mask.name for p in found.pictures if p.mask is not None]
        if masks is not None and beside:
            notes.append(f"Masks are {masks_are}, so mask files are not used: {some(beside)}")
            found = replace(found, pictures=tuple(replace(p, mask=None) for p in found.pictures))
        given, count = read(found), len(found.pictures)
    if not count:
        raise ConfigError("There are no pictures to train on")
    lines = [line.strip() for line in captions or []]
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) > count:
        raise ConfigError("There are more captions than pictures", found=len(lines), expected=f"{count} or fewer")
    lines += [""] * (count - len(lines))
    if masks is not None and len(masks) not in (1, count):
        raise ConfigError("The number of masks does not fit", found=len(masks), expected=f"1 or {count}")
    seen = hashlib.sha256()
    kept: dict[str, tuple[Any, Any]] = {}

    def complete() -> Iterator[Picture]:
        for i, picture in enumerate(given):
            if masks is not None:
                picture = replace(picture, mask=spread(masks[i % len(masks)], picture.image.size), mask_is=mask_is)
            if pictures is not None or masks is not None:
                kept[picture.name] = (picture.image, picture.mask)
            for part in (picture.image, picture.mask):
                seen.update(b"none" if part is None else f"{part.size}".encode() + part.tobytes())
            yield replace(picture, caption=lines[i] or picture.caption)

    records, remarks = data.make_records(
        complete(), resolution, prompt=instance_prompt, trigger=trigger, step=bucket_step, repeats=repeats, flips=flips,
        square=not buckets,
    )
    # Of a mask its pixels are in the digest, not where its file is.
    plain = [{**asdict(r), "name": i // (2 if flips else 1)} for i, r in enumerate(records)]
    for one in plain:
        del one["mask"]
    seen.update(json.dumps([plain, class_prompt.strip(), resolution]).encode())
    return TrainingSet(
        tuple(records), kept, class_prompt.strip(), trigger, resolution, seen.hexdigest(), (*notes, *remarks)
    )


def to_pillow(image: Tensor) -> Any:
    """(height, width, 3), 0..1, any dtype and device -> Pillow."""
    from PIL import Image

    return Image.fromarray((image.detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy())


def from_pillow(picture: Any) -> Tensor:
    """Pillow -> float32 (1, height, width, 3), 0..1: ComfyUI's IMAGE."""
    return to_tensor(picture.convert("RGB")).unsqueeze(0)
