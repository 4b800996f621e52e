"""The index of one model: adapter module name -> parameter key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .families import family_of_model
from .other_names import other_names
from .spelling import PARTS, BaseNames, ModuleName, clean, parse, underscored
from .words import Piece, other_words


@dataclass(frozen=True)
class Target:
    """Where a module's weight is: parameter `key`, of it the rows (start, length) or all (None).

    `swap_halves`: the file's upper and lower half of the rows are the model's lower and upper half (shift
    and scale of an adaptive norm).
    """

    key: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False


Targets = tuple[Target, ...]


@dataclass(frozen=True)
class Spelling:
    """What one weight is called: for writing files.

    part: "unet", "te1", "te2" or "te3".   path: the model's own dotted path, without prefix.
    others: its names in the other layout, each with the rows (start, length) that it is of the weight, None for all, and whether
    the halves of the rows are exchanged; several names where that layout keeps the parts of a fused matrix apart, () if none.
    diffusers: the model's own names are diffusers' as far as its layers tell, the others its authors'.
    """

    part: str
    path: str
    others: tuple[tuple[str, tuple[int, int] | None, bool], ...]
    diffusers: bool = False

# Who may use a name, best first. A lower rank never replaces a better one.
_OWN, _FULL, _OTHER_LAYOUT, _PARAMETER = range(4)


class NameIndex:
    """Finds the parameters of one model by the module names of adapter files.

    shapes: every parameter key of the model (checkpoint, bare diffusion model or text encoder, live ComfyUI
    model, diffusers) -> shape; kept as an attribute.
    family: what model this is, for messages (see `families.family_of_model`).

    Matching ignores the difference between `.` and `_`. When that, or another layout, makes one name mean
    two modules, the module that bears the name itself wins over one that has it in another layout; between
    two equals the name stays unresolved, unless it is written with the model's own dots.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        self.shapes = shapes
        self._exact: dict[str, Targets] = {}
        self._spellings: dict[str, Spelling] = {}
        self._tables: dict[str, dict[str, tuple[int, Targets]]] = {part: {} for part in PARTS}
        base = BaseNames(shapes)
        keys: dict[str, dict[str, str]] = {part: {} for part in PARTS}
        for key in shapes:
            part, path = base.split(key)
            if part == "none" or _is_transposed(path):
                continue
            module = _module(key)
            target = (Target(key),)
            self._exact[module] = target
            rank = _PARAMETER if path.endswith(".bias") else _OWN
            self._add(part, _module(path), target, rank)
            self._add(part, module, target, max(rank, _FULL))
            if not path.endswith(".bias"):
                keys[part].setdefault(_module(path), key)
        for part, found in keys.items():
            others: dict[str, list] = {}
            diffusers = False
            for alias in other_names({path: shapes[key] for path, key in found.items()}):
                targets = tuple(Target(found[path], rows, alias.swap) for path, rows in alias.parts)
                path, diffusers = alias.parts[0][0], diffusers or alias.authors
                if len(targets) == 1 and not alias.further:
                    others.setdefault(path, []).append((alias.name, targets[0].rows, alias.swap))
                self._add(part, alias.name, targets, _OTHER_LAYOUT)
            for path, key in found.items():
                self._spellings[key] = Spelling(part, path, tuple(others.get(path, ())), diffusers)
        self.family: str = family_of_model(
            {p: {m: shapes[k] for m, k in found.items()} for p, found in keys.items()}
        )

    def _add(self, part: str, name: str, targets: Targets, rank: int) -> None:
        table, name = self._tables[part], underscored(name)
        known = table.get(name)
        if known is None or rank < known[0]:
            table[name] = (rank, targets)
        elif rank == known[0] and known[1] != targets:
            table[name] = (rank, ())  # two equals: nobody's

    def resolve(self, module: str, clip: str = "te1") -> list[Target]:
        """Where the weight of an adapter's module is; [] = no such module here, or an ambiguous name.

        clip: which CLIP a name without a prefix is for, see `loose_clip`.
        Several targets: the file's module is one fused matrix whose parts the model stores apart, stacked
        in this order.
        """
        module = clean(module)
        if module in self._exact:
            return list(self._exact[module])
        name = parse(module)
        for part in (name.part,) if name.part else self._parts_for(name, clip):
            table = self._tables[part]
            for path in name.paths:
                hit = table.get(path)
                if hit is not None:
                    return list(hit[1])
            for path in name.paths:
                if found := self._in_other_words(table, path):
                    return found
        return []

    def _in_other_words(self, table: Mapping[str, tuple[int, Targets]], path: str) -> list[Target]:
        def look(name: str) -> list[Piece]:
            _, targets = table.get(name, (0, ()))
            return [(t.key, t.rows, t.swap_halves) for t in targets]

        return [Target(*piece) for piece in other_words(path, look, self.shapes)]

    def has(self, part: str) -> bool:
        """Whether the model has this part: "unet", "te1", "te2" or "te3"."""
        return bool(self._tables[part])

    def spelling(self, key: str) -> Spelling | None:
        """What the weight of this parameter key is called in either layout; None for keys that are no module's weight."""
        return self._spellings.get(key)

    def _parts_for(self, name: ModuleName, clip: str) -> Sequence[str]:
        """Where to look if the prefix does not say: diffusion model or CLIP, as the path allows."""
        if name.text == "t5":
            return ("te3",)
        clip = "te1" if clip == "te1" and self._tables["te1"] else "te2"
        return (clip,) if name.text == "clip" else ("unet", clip)


def _module(key: str) -> str:
    """The module of a parameter; parameters that are not a module's `weight` keep their name."""
    if key.endswith(".in_proj_weight"):
        return key.removesuffix("_weight")
    return key.removesuffix(".weight")


def _is_transposed(path: str) -> bool:
    """open_clip stores its text projection as (in, out); no adapter of the usual (out, in) one fits it."""
    return path == "text_projection"
