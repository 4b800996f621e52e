"""Models that are lists of equal blocks, spelled in two ways: how a table of names becomes aliases."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

Shapes = Mapping[str, Sequence[int]]  # dotted module path -> weight shape
Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Alias:
    """`name` in the other layout is these modules (or rows of them), stacked.

    swap: the two halves of the rows are exchanged.   further: only files use this name, nothing is written under it.
    authors: the name is the authors', the model's own are diffusers'.
    """

    name: str
    parts: tuple[tuple[str, Rows], ...]
    swap: bool = False
    further: bool = False
    authors: bool = False


Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Blocks:
    """A list of equal blocks: `original`.N.<key> is `other`.N.<value>; several values are the parts of one
    fused matrix, in row order.

    Where the number does not stand at the end, or there are several, "#" stands for it.   last: entries that are
    called otherwise in the last block.
    """

    original: str
    other: str
    table: Table
    last: Table = field(default_factory=dict)

    def there(self, shapes: Shapes, prefix: str) -> Iterator[tuple[tuple[str, ...], Table]]:
        """(numbers, table) of every block that is there, under `original` or `other` as `prefix`."""
        pattern = re.compile(r"(\d+)".join(map(re.escape, _numbered(prefix).split("#"))) + r"\.")
        found = sorted({m.groups() for m in map(pattern.match, shapes) if m}, key=lambda numbers: [int(n) for n in numbers])
        return ((numbers, {**self.table, **(self.last if numbers == found[-1] else {})}) for numbers in found)


@dataclass(frozen=True)
class Layout:
    """Two spellings of one architecture.

    top: modules outside the blocks; further values are further names, which only files use.
    original_has, other_has: patterns; a model uses that spelling if each of them matches the start of one
    of its module paths.
    swapped: original names whose two halves of rows (shift and scale, value and gate) are exchanged in the other
    spelling.   swapped_if_two: those in blocks of which that is true only where they have two parts.
    """

    original_has: tuple[str, ...]
    other_has: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    top: Table
    swapped: frozenset[str] = frozenset()
    swapped_if_two: frozenset[str] = frozenset()

    def names(self, shapes: Shapes, kinds: Collection[str]) -> list[Alias]:
        """Every alias of a model that has one of the two spellings; none for any other model. kinds: see `kinds`."""
        if _has_all(kinds, self.original_has):
            return list(self._of_original(shapes))
        if _has_all(kinds, self.other_has):
            return [replace(alias, authors=True) for alias in self._of_other(shapes)]
        return []

    def _of_original(self, shapes: Shapes) -> Iterator[Alias]:
        for original, others in self.top.items():
            for i, other in enumerate(others) if original in shapes else ():
                yield Alias(other, ((original, None),), original in self.swapped, further=i > 0)
        for blocks in self.blocks:
            for n, table in blocks.there(shapes, blocks.original):
                here, there = _at(blocks.original, n), _at(blocks.other, n)
                for original, others in table.items():
                    path = f"{here}.{original}"
                    if path not in shapes:
                        continue
                    swap = original in self.swapped or (
                        original in self.swapped_if_two
                        and _has_two_chunks(shapes, path, f"{here}.context_block.attn.qkv", 3)
                    )
                    split = _row_split(shapes, path, len(others))
                    for i, (other, rows) in enumerate(zip(others, split, strict=False)):
                        yield Alias(f"{there}.{other}", ((path, rows),), swap)
                        if rows:  # OMI's name of a part of a fused matrix
                            yield Alias(f"{path}.{i}", ((path, rows),), further=True)
                    if original == "linear1" and len(split) > 3 and split[3]:  # two parts, as some trainers have them
                        yield Alias(f"{path}_qkv", ((path, (0, split[3][0])),), further=True)
                        yield Alias(f"{path}_mlp", ((path, split[3]),), further=True)

    def _of_other(self, shapes: Shapes) -> Iterator[Alias]:
        for original, others in self.top.items():
            here = next((other for other in others if other in shapes), None)
            for name in (original, *others) if here is not None else ():
                if name != here:
                    yield Alias(name, ((here, None),), original in self.swapped, further=name != original)
        for blocks in self.blocks:
            for n, table in blocks.there(shapes, blocks.other):
                here, there = _at(blocks.original, n), _at(blocks.other, n)
                for original, others in table.items():
                    path = f"{here}.{original}"
                    parts = [(f"{there}.{other}", None) for other in others]
                    for i, part in enumerate(parts):
                        if len(parts) > 1 and part[0] in shapes:
                            yield Alias(f"{path}.{i}", (part,))
                    if any(part not in shapes for part, _ in parts):
                        continue
                    swap = original in self.swapped or (
                        original in self.swapped_if_two
                        and _has_two_chunks(shapes, parts[0][0], f"{there}.attn.add_q_proj", 1)
                    )
                    yield Alias(path, tuple(parts), swap)
                    if original == "linear1" and len(parts) > 3:
                        yield Alias(f"{path}_qkv", tuple(parts[:3]))
                        yield Alias(f"{path}_mlp", (parts[3],), further=True)


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kinds(shapes: Shapes) -> set[str]:
    """The module paths with all blocks' numbers alike: far fewer to look through."""
    return {_NUMBER.sub("0", path) for path in shapes}


def _has_all(kinds: Collection[str], patterns: Sequence[str]) -> bool:
    return all(any(map(re.compile(pattern).match, kinds)) for pattern in patterns)


def _numbered(prefix: str) -> str:
    return prefix if "#" in prefix else f"{prefix}.#"


def _at(prefix: str, numbers: tuple[str, ...]) -> str:
    """The prefix with its numbers: ``double_blocks`` and ("3",) -> ``double_blocks.3``."""
    pieces = _numbered(prefix).split("#")
    return "".join(piece + number for piece, number in zip(pieces, (*numbers, ""), strict=True))


def _row_split(shapes: Shapes, path: str, count: int) -> list[Rows]:
    """(start, length) of each part of a fused matrix; [None] = one part, all rows; [] = none fit."""
    if count == 1:
        return [None]
    shape = shapes[path]
    if len(shape) == 0:
        return []
    rows = shape[0]
    if count < 4:
        parent, _, _ = path.rpartition(".")
        out = next((shapes[o] for word in OUT_WORDS if (o := f"{parent}.{word}") in shapes), ())
        sizes = attention_sizes(rows, count, out)
    else:  # Flux' linear1: query, key, value, then the wider MLP; linear2 leads back to the model's width
        beside = shapes.get(path.removesuffix("linear1") + "linear2", ())
        width = beside[0] if beside else shape[-1]
        sizes = [width] * 3 + [rows - 3 * width]
    if not sizes or min(sizes) <= 0 or sum(sizes) != rows:
        return []
    return [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


#: What attention's last projection is called beside a fused one.
OUT_WORDS = ("out", "proj", "out_proj", "to_out", "to_out.0")


def attention_sizes(rows: int, count: int, out: Sequence[int]) -> list[int]:
    """Rows of query, key and value (count 3) or key and value (2) in a fused matrix; [] if they cannot be known.

    out: shape of the output projection, () if there is none. Queries are as wide as its input, which grouped attention
    (Lumina 2) makes wider than keys and values.
    """
    if count == 3 and len(out) == 2 and out[1] < rows and (rows - out[1]) % 2 == 0:
        return [out[1], (rows - out[1]) // 2, (rows - out[1]) // 2]
    return [rows // count] * count if rows % count == 0 else []


def _has_two_chunks(shapes: Shapes, norm: str, attention: str, thirds: int) -> bool:
    """True for the context norm of SD3's last block, which only reads its context: two chunks, not six.

    Only those two (shift, scale) are stored the other way round by diffusers. The attention beside it has
    `thirds` times the model's width in rows.
    """
    rows, beside = shapes[norm][:1], shapes.get(attention, ())[:1]
    return len(rows) == len(beside) == 1 and rows[0] * thirds == 2 * beside[0]
