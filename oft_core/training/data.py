"""Training examples: aspect-ratio buckets, captions, records, and an order that is a pure function of the seed.

What a host caches for a record (latents, text embeddings) is its own business; ``Record`` says what there is to cache.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, raise_faults
from .folder import read, scan, some
from .pictures import Picture, fitted, open_mask, open_picture, spread, to_tensor
from .seeds import generator

#: Stands for the trigger word in captions.
TRIGGER = "[trigger]"
#: A picture that loses a larger share of its area to its bucket is named.
MOST_LOST = 0.2


@dataclass(frozen=True)
class Record:
    """One training example.

    name: file path or any label that is unique in the set.   caption.   bucket: (width, height) in pixels that it is fitted to.
    repeats: how often it is seen an epoch.   flip: mirrored copy.   has_mask: a mask goes with it.   role: ``instance`` or ``class``.
    mask: file of the mask, None if it is the picture's transparency or the host has it.
    """

    name: str
    caption: str
    bucket: tuple[int, int]
    repeats: int = 1
    flip: bool = False
    has_mask: bool = False
    role: str = "instance"
    mask: str | None = None


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


def lost(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The share of a picture's area, 0 to below 1, that is cut off to fit it to the bucket; both (width, height)."""
    low, high = sorted((size[0] * bucket[1], size[1] * bucket[0]))
    return 1 - low / high


# -------------------------------------------------------------------- captions


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


# -------------------------------------------------------------------- records


def make_records(
    pictures: Iterable[Picture], resolution: int, *, prompt: str = "", trigger: str = "", step: int = 64, longest: float = 2.0,
    repeats: int = 1, flips: bool = False, square: bool = False, role: str = "instance",
) -> tuple[list[Record], list[str]]:
    """A record for every picture (and its mirror image, with ``flips``), and what a person should know of them, a line each.

    A picture without a caption takes what it has otherwise, else ``prompt``; its repeats count ``repeats`` times.   square: one square
    bucket for all.   The pictures are looked at one after the other. Raises ConfigError for pictures of which nothing counts.
    """
    if repeats < 1:
        raise ConfigError("Option 'repeats' is out of range", found=repeats, expected="1 or more")
    buckets = [(max(step, resolution // step * step),) * 2] if square else make_buckets(resolution, step, longest)
    records: list[Record] = []
    faults: list[ConfigError] = []
    remarks: dict[str, list[str]] = {}
    cut: list[tuple[float, str, tuple[int, int]]] = []
    count = own = small = without_word = 0
    elsewhere = set()
    for picture in pictures:
        bucket = nearest_bucket(picture.image.size, buckets)
        if picture.mask is not None and (fault := _nothing_counts(picture, bucket)):
            faults.append(fault)
        written = picture.caption or picture.otherwise or prompt
        count += 1
        own += bool(picture.caption)
        if not picture.caption:
            without = "only the trigger word" if trigger else "none"
            elsewhere.add("the name of their subfolder" if picture.otherwise else "the instance prompt" if prompt.strip() else without)
        small += picture.image.size[0] < bucket[0] or picture.image.size[1] < bucket[1]
        without_word += not trigger and TRIGGER in written
        if (share := lost(picture.image.size, bucket)) > MOST_LOST:
            cut.append((share, picture.label, picture.image.size))
        for remark, name in picture.remarks:
            remarks.setdefault(remark, []).append(name)
        caption, masked = with_trigger(written, trigger), picture.mask is not None
        for flip in (False, True) if flips else (False,):
            records.append(
                Record(picture.name, caption, bucket, picture.repeats * repeats, flip, masked, role, picture.mask_file)
            )
    raise_faults(faults)
    notes = [f"{remark}: {some(names)}" for remark, names in remarks.items()]
    others = f"; the others have {' or '.join(sorted(elsewhere))}" if elsewhere else ""
    notes.append(f"{own} of {count} pictures have captions of their own{others}.")
    if small:
        notes.append(f"{small} pictures are smaller than their size in training and are enlarged.")
    if cut:
        notes.append(_cut_off(cut, buckets, square, longest))
    if without_word:
        notes.append(f"There is no trigger word: {TRIGGER} was taken out of {without_word} caption{'s' * (without_word > 1)}.")
    if not any(r.caption for r in records):
        notes.append("No picture has a caption. An instance prompt with a trigger word teaches a subject better.")
    return records, notes


def _nothing_counts(picture: Picture, bucket: tuple[int, int]) -> ConfigError | None:
    """What is wrong with a mask that is black wherever the picture is used."""
    if fitted(picture.mask, bucket).getextrema()[1]:
        return None
    what, hint = picture.mask_is
    where = "everywhere"
    if picture.mask.getextrema()[1]:
        where = f"in the {bucket[0]} x {bucket[1]} pixels that are cut from it"
        hint = "Cut the picture yourself, so that what counts is in the middle."
    return ConfigError("Nothing of this picture would be learnt", file=picture.name, found=f"{what} {where}", hint=hint)


def _cut_off(cut: list[tuple[float, str, tuple[int, int]]], buckets: Sequence[tuple[int, int]], square: bool, longest: float) -> str:
    """A line on pictures of which much is cut off: (share, name, size) of each."""
    names = [f"{name} {100 * share:.0f} %" for share, name, _ in sorted(cut, key=lambda one: -one[0])]
    if square:
        hint = "With buckets on, pictures keep nearly their own shape."
    elif any(max(size) > longest * min(size) for _, _, size in cut):
        reach = max(width / height for width, height in buckets)
        hint = f"Buckets go up to {reach:.2g} to 1: cut longer pictures yourself, or into several."
    else:
        hint = "A smaller bucket step or a larger resolution gives sizes nearer to their shapes."
    return f"More than {100 * MOST_LOST:.0f} % is cut off of {len(cut)} picture{'s' * (len(cut) > 1)}: {some(names)}. {hint}"


def folder_records(
    folder: str | os.PathLike, resolution: int, *, prompt: str = "", trigger: str = "", step: int = 64, longest: float = 2.0,
    repeats: int = 1, flips: bool = False, square: bool = False, role: str = "instance", notes: list[str] | None = None,
) -> list[Record]:
    """Records of a folder as ``folder.scan`` reads it; arguments as of ``make_records``.

    notes: gets what a person should know, a line each. Raises ConfigError with the names of all files that cannot be used.
    """
    found = scan(folder)
    records, remarks = make_records(
        read(found), resolution, prompt=prompt, trigger=trigger, step=step, longest=longest, repeats=repeats, flips=flips, square=square,
        role=role,
    )
    if notes is not None:
        notes += [*found.notes, *remarks]
    return records


def load(path: str | os.PathLike, record: Record) -> tuple[Tensor, Tensor | None]:
    """A record's picture (height, width, 3) and mask (height, width, 1) or None, float32 0..1, fitted to its bucket."""
    picture, mask = open_picture(path)
    if record.mask is not None:
        mask = spread(open_mask(record.mask), picture.size)
    image = to_tensor(fitted(picture, record.bucket, record.flip))
    return image, None if mask is None else to_tensor(fitted(mask, record.bucket, record.flip))


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
