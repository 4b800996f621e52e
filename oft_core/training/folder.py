"""A folder of pictures: which files belong together, and subfolders with numbers of repeats.

Captions and masks lie beside their pictures and have their names: ``cat.txt``, ``cat.caption``, ``cat.png.txt``,
``cat-masklabel.png``. Upper and lower case, the two ways of writing accents (macOS), and spaces and dots at the end of a name make no
difference, as on the systems that these files come from.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError, raise_faults
from .pictures import MASK_FILE, TRANSPARENCY, Picture, open_mask, open_picture, spread

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".gif")
#: Caption files; of two for one picture, the kind that is named first here.
TEXTS = (".txt", ".caption")
#: A larger number in front of a subfolder's name is a date.
MOST_REPEATS = 1000
#: Names that a remark lists at most.
MOST_NAMES = 5
#: What systems keep in folders of pictures, besides names that begin with a dot.
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")
#: OneTrainer's masks and control pictures, also several for one picture.
_LABEL = re.compile(r"(.+)-(mask|cond)label[-_ ]*\(?(\d*)\)?", re.IGNORECASE)
#: kohya's subfolders: number of repeats, and the caption of pictures without one.
_REPEATS = re.compile(r"(\d+)_(.*)")


@dataclass(frozen=True)
class Found:
    """A picture of a folder with its caption file and mask file, or None.

    label: its name as seen from the folder.   repeats, otherwise: of its subfolder, 1 and "" without one.
    """

    path: Path
    label: str
    text: Path | None
    mask: Path | None
    repeats: int
    otherwise: str


@dataclass(frozen=True)
class Folder:
    """What training reads of a folder.

    pictures: in their order.   notes: what a person should know of the other files.   read: all files that matter.   subfolders: all.
    """

    path: Path
    pictures: tuple[Found, ...]
    notes: tuple[str, ...]
    read: tuple[Path, ...]
    subfolders: tuple[Path, ...]


@dataclass(frozen=True)
class _Beside:
    """A file that belongs to a picture called ``base``. kind: of several, the lowest goes first.   plain: its ending is written as usual."""

    path: Path
    base: str
    kind: int
    plain: bool


class _Files:
    """Files of one folder by what they are, each list sorted by name."""

    def __init__(self, folder: Path):
        self.pictures: list[Path] = []
        self.texts: list[_Beside] = []
        self.masks: list[_Beside] = []
        self.controls: list[Path] = []
        self.others: list[Path] = []
        self.subfolders: list[Path] = []
        try:
            inside = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise ConfigError("This folder cannot be read", file=folder, found=str(error)) from error
        for path in inside:
            base, ending = _split(path.name)
            kind = ending.lower()
            label = _LABEL.fullmatch(base) if kind in PICTURES else None
            if path.is_dir():
                self.subfolders.append(path)
            elif path.name.lower() in _OF_THE_SYSTEM:
                continue
            elif not path.is_file():
                self.others.append(path)
            elif label and label[2].lower() == "cond":
                self.controls.append(path)
            elif label:
                self.masks.append(_Beside(path, label[1], int(label[3] or -1), base.endswith("-masklabel")))
            elif kind in PICTURES:
                self.pictures.append(path)
            elif kind in TEXTS:
                self.texts.append(_Beside(path, base, TEXTS.index(kind), ending == kind))
            else:
                self.others.append(path)

    @property
    def all(self) -> list[Path]:
        beside = [one.path for one in (*self.texts, *self.masks)]
        return sorted([*self.pictures, *beside, *self.controls, *self.others])


# -------------------------------------------------------------------- what belongs together


def _split(name: str) -> tuple[str, str]:
    """(name, ending with its dot) of a file, without spaces at the end."""
    return os.path.splitext(name.rstrip())


def _key(name: str) -> str:
    """Equal for names that other systems do not tell apart."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.rstrip(" .")).casefold())


def _belonging(pictures: Sequence[Path], files: Sequence[_Beside]) -> dict[Path, list[Path]]:
    """The files of every picture, the one that counts first.

    ``cat.png.txt`` goes before ``cat.txt``, then the kind decides, then who is spelled exactly as the picture.
    """
    by_key: dict[str, list[_Beside]] = {}
    for one in files:
        by_key.setdefault(_key(one.base), []).append(one)
    # Pictures that differ only in their spelling: "Cat.png" and "cat.png" each take what is spelled as they are.
    alike = Counter((_key(base), ending.lower()) for base, ending in map(_split, (p.name for p in pictures)))
    out = {}
    for picture in pictures:
        base, ending = _split(picture.name)
        found = []
        for short, name in enumerate((base + ending, base)):
            for one in by_key.get(_key(name), ()):
                off = 2 if one.base != name else int(not one.plain)
                if off < 2 or alike[_key(base), ending.lower()] == 1:
                    found.append((short, one.kind, off, one.path.name, one.path))
        out[picture] = [path for *_, path in sorted(found)]
    return out


# -------------------------------------------------------------------- folders


def some(names: Sequence[str]) -> str:
    """The names in a line, at most ``MOST_NAMES`` of them."""
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")


def scan(folder: str | os.PathLike) -> Folder:
    """The pictures directly in the folder, sorted by name, with what lies beside them; without any, those of its subfolders ``N_name``.

    Hidden files and those of the system are passed over. Nothing is opened. Raises ConfigError if there is no such folder or no picture.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError("There is no such folder", file=root)
    own = _Files(root)
    parts, names, passed = [(own, 1, "")], [], []
    for sub in own.subfolders:
        numbered = None if own.pictures else _REPEATS.fullmatch(sub.name)
        if not numbered or not 1 <= int(numbered[1]) <= MOST_REPEATS:
            passed.append(sub.name)
            continue
        files = _Files(sub)
        parts.append((files, int(numbered[1]), numbered[2].strip()))
        passed += [f"{sub.name}/{p.name}" for p in files.subfolders]
        if not files.pictures:
            passed.append(f"{sub.name} (no pictures)")
        else:
            names.append(f"{sub.name} ({_number(len(files.pictures), 'picture')}, {_number(int(numbered[1]), 'time')} each)")
    if not any(files.pictures for files, _, _ in parts):
        raise _no_pictures(root, own)
    notes = []
    if names:
        notes.append(f"Read from subfolders that begin with a number of repeats, as kohya's do: {some(names)}")
    if passed:
        notes.append(_line(passed, "subfolder was left out", "subfolders were left out"))
    pictures, gathered = [], _Gathered(root)
    for files, repeats, otherwise in parts:
        texts, masks = _belonging(files.pictures, files.texts), _belonging(files.pictures, files.masks)
        gathered.add(files, texts, masks)
        for path in files.pictures:
            text, mask = (next(iter(of[path]), None) for of in (texts, masks))
            pictures.append(Found(path, gathered.label(path), text, mask, repeats, otherwise))
    read = sorted(path for files, _, _ in parts for path in files.all)
    return Folder(root, tuple(pictures), (*notes, *gathered.notes()), tuple(read), tuple(own.subfolders))


class _Gathered:
    """What is to be said about files that are no pictures."""

    def __init__(self, root: Path):
        self.root = root
        self.lines: dict[tuple[str, str], list[str]] = {}

    def label(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def add(self, files: _Files, texts: Mapping[Path, list[Path]], masks: Mapping[Path, list[Path]]) -> None:
        self._beside(files.texts, texts, "caption", "name.ext.txt")
        self._beside(files.masks, masks, "mask", "name.ext-masklabel.png")
        self._say("control picture is not used", "control pictures are not used", map(self.label, files.controls))
        self._say("file was left out", "files were left out", map(self.label, files.others))

    def notes(self) -> list[str]:
        return [_line(names, *what) for what, names in self.lines.items()]

    def _beside(self, files: Sequence[_Beside], of: Mapping[Path, list[Path]], what: str, apart: str) -> None:
        users: dict[Path, list[Path]] = {one.path: [] for one in files}
        instead: dict[Path, Path] = {}
        for picture, found in of.items():
            for i, path in enumerate(found):
                if i:
                    instead.setdefault(path, found[0])
                else:
                    users[path].append(picture)
        shared = [f"{self.label(p)} ({', '.join(u.name for u in by)})" for p, by in users.items() if len(by) > 1]
        second = [f"{self.label(p)} ({by.name} is)" for p, by in instead.items() if not users[p]]
        alone = [self.label(p) for p, by in users.items() if not by and p not in instead]
        self._say(
            f"{what} belongs to several pictures; {apart} would be one picture's own",
            f"{what}s belong to several pictures each; {apart} would be one picture's own", shared,
        )
        self._say(f"second {what} of a picture is not used", f"second {what}s of pictures are not used", second)
        self._say(f"{what} file belongs to no picture", f"{what} files belong to no picture", alone)

    def _say(self, one: str, many: str, names: Iterable[str]) -> None:
        for name in names:
            self.lines.setdefault((one, many), []).append(name)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _line(names: Sequence[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}: {some(names)}"


def _no_pictures(root: Path, own: _Files) -> ConfigError:
    below = []
    for sub in own.subfolders:
        with contextlib.suppress(ConfigError):
            files = _Files(sub)
            if files.pictures or any(_REPEATS.fullmatch(p.name) for p in files.subfolders):
                below.append(sub.name)
    hint = None
    if below:
        hint = f"Choose one of its subfolders ({some(below)}), or put a number of repeats before their names: 10_name."
    others = [p.name for p in own.all] + [f"{p.name}/" for p in own.subfolders]
    return ConfigError(
        "The folder holds no pictures", file=root, found=some(others) or None, expected="files ending in " + ", ".join(PICTURES), hint=hint
    )


# -------------------------------------------------------------------- reading


def read(folder: Folder) -> Iterator[Picture]:
    """The pictures of a folder with captions and masks, one after the other.

    Raises ConfigError after the last one, with the names of all files that cannot be read.
    """
    faults: list[ConfigError] = []
    for one in folder.pictures:
        caption, remarks = "", []
        try:
            caption = "" if one.text is None else read_text(one.text)
        except ConfigError as error:
            faults.append(error)
        try:
            image, mask = open_picture(one.path)
        except ConfigError as error:
            faults.append(error)
            continue
        if one.text is not None and not caption:
            remarks.append(("Empty captions count as none", one.text.name))
        if one.mask is not None:
            if mask is not None:
                remarks.append(("Of mask file and transparency the mask file counts", one.label))
            try:
                drawn = open_mask(one.mask)
            except ConfigError as error:
                faults.append(error)
                continue
            # A mask that was scaled may be rounded by a pixel.
            if abs(drawn.width * image.height - drawn.height * image.width) > max(*drawn.size, *image.size):
                remarks.append(("Masks of another shape than their pictures are stretched", one.mask.name))
            mask = spread(drawn, image.size)
        yield Picture(
            str(one.path), one.label, image, mask, caption, one.otherwise, one.repeats, one.mask and str(one.mask),
            TRANSPARENCY if one.mask is None else MASK_FILE, tuple(remarks),
        )
    raise_faults(faults, folder.path)


def read_text(path: Path) -> str:
    """A caption file as one line: UTF-8, UTF-16 also without its mark, or UTF-32. Raises ConfigError for anything else."""
    try:
        return " ".join(_decoded(path.read_bytes()).split())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "This caption cannot be read", file=path, found=str(error), expected="UTF-8 text", hint="Save it as UTF-8 in your editor."
        ) from error


def _decoded(raw: bytes) -> str:
    # The mark of UTF-16 is the first half of UTF-32's.
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        text = raw.decode("utf-32")
    elif raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = raw.decode("utf-16")
    elif b"\0" not in raw:
        return raw.decode("utf-8-sig")
    else:
        # Latin letters and blanks of UTF-16 have a zero in their upper half; few other letters have one in their lower half.
        even, odd = raw[::2].count(0), raw[1::2].count(0)
        if max(even, odd) < 2 * min(even, odd) or 4 * (even + odd) < len(raw) and _is_utf8(raw):
            raise ValueError("text with NUL characters")
        text = raw.decode("utf-16-be" if even > odd else "utf-16-le")
    if any(unicodedata.category(c) == "Cc" and not c.isspace() for c in text):
        raise ValueError("text with control characters")
    return text


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
