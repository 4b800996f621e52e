"""Which model families work, measured on tiny models of each: the table of docs/families.md.

usage: python -m dev.families HOST_DIR [--write docs] [--only NAME ...]     (with the host's Python; about five minutes)

What is measured are the `Column`s of `LOADING` and `TRAINING`.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dev.inprocess import start

REPO = Path(__file__).resolve().parent.parent
#: A weight of more numbers is found, but not rotated here.
LARGEST = 2**18


# ---------------------------------------------------------------- spellings


@dataclass(frozen=True)
class Spelling:
    """How a group of trainers writes names and rotations.

    variants: (prefix, whether the names are diffusers', whether dots become underscores); "*" in a prefix stands for
    ``unet`` or ``transformer``.   side: which side of a layer such files turn.
    """

    title: str
    title_zh: str
    variants: tuple[tuple[str, bool, bool], ...]
    side: str


SPELLINGS = {
    "kohya": Spelling(
        "kohya, LyCORIS, SimpleTuner",
        "kohya、LyCORIS、SimpleTuner",
        (
            ("lycoris_", True, True),
            ("lora_unet_", True, True),
            ("lora_unet_", False, True),
            ("oft_unet_", False, True),
            ("lycoris_", False, True),
        ),
        "out",
    ),
    "onetrainer": Spelling("OneTrainer", "OneTrainer", (("lora_*_", True, True), ("*.", True, False)), "in"),
    "peft": Spelling(
        "PEFT, diffusers, ai-toolkit",
        "PEFT、diffusers、ai-toolkit",
        (("base_model.model.", True, False), ("*.", True, False), ("diffusion_model.", True, False)),
        "in",
    ),
    "original": Spelling(
        "authors' names", "原作者的名称", (("diffusion_model.", False, False), ("model.diffusion_model.", False, False), ("", False, False)), "out"
    ),
}


@dataclass(frozen=True)
class Subject:
    """A family's tiny model and its names: name -> `spellings.Piece`. diffusers: {} if diffusers does not have it."""

    family: Any
    model: Any
    own: Mapping[str, Any]
    diffusers: Mapping[str, Any]

    def names(self, spelling: Spelling) -> list[dict[str, Any]]:
        """For each variant of a spelling: name in the file -> piece. Without diffusers' names the authors' take their place."""
        kind = "unet" if "input_blocks.0.0" in self.own else "transformer"
        out = []
        for prefix, diffusers, flat in spelling.variants:
            names = self.diffusers if diffusers and self.diffusers else self.own
            out.append({prefix.replace("*", kind) + (n.replace(".", "_") if flat else n): p for n, p in names.items()})
        return out


def subject(name: str) -> Subject:
    """The tiny model of an entry of `every_family` and its names."""
    import every_family
    import spellings

    family = every_family.FAMILIES[name]
    model = family.build()
    inner = model.model.diffusion_model
    return Subject(family, model, spellings.own_names(inner), spellings.diffusers_names(name, inner, model.model.model_config.unet_config))


# ---------------------------------------------------------------- loading


def found(subject: Subject, spelling: Spelling) -> tuple[int, int, list[str]]:
    """(names that lead to the right rows of the right weight, names, examples of others), of the spelling's worst variant.

    By the pack's own names alone, without ComfyUI's tables.
    """
    from comfyui_oft.nodes.binding import names as host_names
    from comfyui_oft.oft_core import NameIndex, Target

    index = NameIndex(host_names.shapes_of(subject.model))
    counts = []
    for names in subject.names(spelling):
        wrong = [
            name for name, piece in names.items()
            if index.resolve(name) != [Target(f"diffusion_model.{piece.path}.weight", piece.rows, piece.swap)]
        ]
        counts.append((len(names) - len(wrong), len(names), wrong[:5]))
    return min(counts, key=lambda count: (count[0] / count[1], -count[1]))


def exact(subject: Subject, spelling: Spelling, seed: int = 0) -> list[str]:
    """Weights that differ from dense rotations after ComfyUI has loaded a file with all names of the spelling's first variant.

    Rotations are written for every layer that blocks of 8, 4 or 2 fit; the expected weights are products in float64.
    """
    from comfyui_oft.nodes.binding import apply as host
    from comfyui_oft.oft_core import Strength, read_tensors

    base = {k: v.detach().clone() for k, v in subject.model.model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    seen = set()
    for name, piece in subject.names(spelling)[0].items():
        key = f"diffusion_model.{piece.path}.weight"
        if (piece.path, piece.rows) in seen or base[key].numel() > LARGEST:
            continue  # some layers have two names
        seen.add((piece.path, piece.rows))
        begin, length = piece.rows or (0, base[key].shape[0])
        axis = length if spelling.side == "out" else math.prod(base[key].shape[1:])
        block = next((b for b in (8, 4, 2) if axis % b == 0), None)
        if block is None:
            continue
        whole = expected.setdefault(key, base[key].double())
        part = whole[begin : begin + length]
        if spelling.side == "out":
            stored = torch.randn(axis // block, block, block, generator=generator) * 0.1
            tensors |= {f"{name}.oft_blocks": stored, f"{name}.alpha": torch.tensor(0.0)}
            rotation = _cayley(stored.double() - stored.double().mT).mT
            part = _swap(part) if piece.swap else part
            part = (rotation @ part.reshape(axis // block, block, -1)).reshape(part.shape)
            part = _swap(part) if piece.swap else part
        else:
            stored = torch.randn(axis // block, block * (block - 1) // 2, generator=generator) * 0.1
            tensors[f"{name}.oft_R.weight"] = stored
            rotation = _series(stored.double(), block)
            if part.ndim == 2 or name.startswith("base_model."):  # OneTrainer turns convolutions the other way
                rotation = rotation.mT
            flat = part.reshape(length, axis // block, 1, block)
            part = (flat @ rotation).reshape(part.shape)
        whole[begin : begin + length] = part
    adapter = read_tensors(tensors, {}, name="families")
    with torch.inference_mode():
        patched = host.apply(adapter, subject.model, None, Strength(1.0), Strength(1.0)).model
        patched.patch_model(torch.device("cpu"))
        try:
            got = {k: v.detach().clone() for k, v in patched.model.state_dict().items()}
        finally:
            patched.unpatch_model(torch.device("cpu"))
    faults = []
    for key, before in base.items():
        want = expected.get(key)
        if want is None:
            same = torch.equal(before, got[key])
        else:
            same = bool((got[key] - want).abs().max() <= 4e-6 * want.abs().max()) and not torch.equal(before, got[key])
        if not same:
            faults.append(key)
    return faults


def _cayley(q: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


def _series(packed: torch.Tensor, block: int) -> torch.Tensor:
    """I + 2Q + 2Q² + 2Q³ + Q⁴ of packed upper triangles."""
    q = torch.zeros(packed.shape[0], block, block, dtype=packed.dtype)
    upper = torch.triu_indices(block, block, 1)
    q[:, upper[0], upper[1]] = packed
    q = q - q.mT
    q2 = q @ q
    return torch.eye(block, dtype=q.dtype) + 2 * q + 2 * q2 + 2 * q2 @ q + q2 @ q2


def _swap(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat(rows.chunk(2)[::-1])


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Column:
    """A column of the table. measure: what stands in a family's cell, in English and Chinese."""

    title: str
    title_zh: str
    measure: Callable[[Subject], tuple[str, str]]


def _loading(spelling: Spelling) -> Column:
    def measure(subject: Subject) -> tuple[str, str]:
        right, count, _ = found(subject, spelling)
        return f"{right} of {count}", f"{right} / {count}"

    return Column(spelling.title, spelling.title_zh, measure)


def _exact(subject: Subject) -> tuple[str, str]:
    wrong = any(exact(subject, spelling) for spelling in SPELLINGS.values())
    return ("no", "否") if wrong else ("yes", "是")


@functools.cache
def _learnt(name: str) -> Any:
    """A `family_training.Learnt`, or None where Train OFT refuses the family."""
    import every_family
    import family_training
    from comfyui_oft.oft_core.training import ConfigError

    try:
        return family_training.learnt(every_family.FAMILIES[name])
    except ConfigError:
        return None


def _trains(subject: Subject) -> tuple[str, str]:
    seen = _learnt(subject.family.name)
    if seen is None:
        return "refused", "拒绝"
    learns = seen.after < 0.999 * seen.before and seen.resumed and seen.unchanged
    drawn = seen.picture < 0.0045 < seen.moved  # half a step of 8 bits, and rounding of merged weights
    return ("yes", "是") if learns and drawn else ("no", "否")


def _read_back(subject: Subject) -> tuple[str, str]:
    seen = _learnt(subject.family.name)
    if seen is None:
        return "–", "–"
    return ("yes", "是") if seen.read_back else ("no", "否")


LOADING = [*map(_loading, SPELLINGS.values()), Column("exact", "精确", _exact)]
TRAINING = [Column("trains", "可训练", _trains), Column("file read back bit-equal", "文件读回逐位相同", _read_back)]
COLUMNS = [*LOADING, *TRAINING]

#: Entry of `every_family` -> what people call it. Entries that a ComfyUI lacks stand below the table.
TITLES = {
    "sd15": "SD 1.x", "sd15_inpaint": "SD 1.x inpainting", "sd15_ip2p": "InstructPix2Pix", "zero123": "Stable Zero123",
    "sd2": "SD 2.x", "sd21_unclip_l": "SD 2.1 unCLIP-L", "sd21_unclip_h": "SD 2.1 unCLIP-H",
    "sd_x4_upscaler": "SD x4 upscaler", "lotus": "Lotus", "sdxl": "SDXL", "sdxl_inpaint": "SDXL inpainting",
    "sdxl_ip2p": "SDXL InstructPix2Pix", "sdxl_refiner": "SDXL refiner", "ssd1b": "SSD-1B", "vega": "Segmind Vega",
    "koala_700m": "KOALA 700M", "koala_1b": "KOALA 1B", "svd": "Stable Video Diffusion", "sv3d_u": "SV3D-u",
    "sv3d_p": "SV3D-p", "sd3": "SD 3", "sd35": "SD 3.5", "flux": "Flux.1 dev", "flux_schnell": "Flux.1 schnell",
    "flux_fill": "Flux.1 Fill", "flux_control": "Flux.1 Canny, Depth", "flux2": "Flux.2", "longcat": "LongCat-Image",
    "chroma": "Chroma", "chroma_radiance": "Chroma Radiance", "auraflow": "AuraFlow", "pixart_alpha": "PixArt-α",
    "pixart_sigma": "PixArt-Σ", "hunyuan_dit": "HunyuanDiT 1.2", "hunyuan_dit1": "HunyuanDiT 1.1", "lumina2": "Lumina 2",
    "z_image": "Z-Image", "qwen_image": "Qwen-Image, Edit", "hidream": "HiDream", "omnigen2": "OmniGen2",
    "hunyuan_image21": "HunyuanImage 2.1", "hunyuan_image21_refiner": "HunyuanImage 2.1 refiner",
    "cosmos_predict2": "Cosmos Predict2 text to image", "anima": "Anima", "kandinsky5_image": "Kandinsky 5 Image",
    "krea2": "Krea 2", "cascade_c": "Stable Cascade C", "cascade_b": "Stable Cascade B", "hunyuan_video": "HunyuanVideo",
    "hunyuan_video_i2v": "HunyuanVideo I2V", "skyreels_i2v": "SkyReels I2V", "hunyuan_video15": "HunyuanVideo 1.5",
    "hunyuan_video15_sr": "HunyuanVideo 1.5 SR", "wan21_t2v": "Wan 2.1, 2.2 T2V", "wan21_i2v": "Wan 2.1, 2.2 I2V",
    "wan21_fun_control": "Wan 2.1 Fun Control", "wan21_vace": "Wan 2.1 VACE", "wan21_camera": "Wan 2.1 Camera",
    "wan21_humo": "Wan 2.1 HuMo", "wan22_5b": "Wan 2.2 5B", "wan22_camera": "Wan 2.2 Camera", "wan22_s2v": "Wan 2.2 S2V",
    "wan22_animate": "Wan 2.2 Animate", "ltxv": "LTX-Video", "ltxav": "LTX-2", "mochi": "Mochi",
    "cosmos1_t2v": "Cosmos 1 T2V", "cosmos1_i2v": "Cosmos 1 I2V", "cosmos_predict2_i2v": "Cosmos Predict2 I2V",
    "kandinsky5_video": "Kandinsky 5 Video", "ace_step": "ACE-Step", "stable_audio": "Stable Audio",
    "hunyuan3d": "Hunyuan3D 2", "hunyuan3d_mini": "Hunyuan3D 2 mini", "hunyuan3d_21": "Hunyuan3D 2.1",
}  # fmt: skip
PAGES = ("families.md", "zh/families.md")
_HEADS = ("family", "家族")
_ABSENT = ("Not in this ComfyUI, so not measured: {}.", "此 ComfyUI 没有，因此未测：{}。")


def measured(names: list[str], columns: list[Column], say: Callable[[str], None] = print) -> tuple[dict, list[str]]:
    """Cells of the entries (name -> [(English, Chinese), one a column]), and the entries that this ComfyUI lacks."""
    import every_family

    cells: dict[str, list[tuple[str, str]]] = {}
    absent = [name for name in names if every_family.FAMILIES[name].missing]
    for name in names:
        if name not in absent:
            one = subject(name)
            cells[name] = [column.measure(one) for column in columns]
            say(f"{TITLES[name]}: {', '.join(cell for cell, _ in cells[name])}")
    return cells, absent


def table(cells: Mapping[str, list[tuple[str, str]]], absent: list[str], columns: list[Column], chinese: bool) -> str:
    """The part of a page that is measured: the table, and a line about families that were not measured."""
    at = int(chinese)
    heads = [_HEADS[at], *((c.title, c.title_zh)[at] for c in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join([TITLES[name], *(cell[at] for cell in row)]) + " |" for name, row in cells.items()]
    if absent:
        lines += ["", _ABSENT[at].format(("、" if chinese else ", ").join(TITLES[name] for name in absent))]
    return "\n".join(lines)


def _around(text: str, chinese: bool) -> tuple[str, str, str]:
    """A page before its table, its table with the line about absent families, and the rest."""
    at, blocks = int(chinese), text.split("\n\n")
    here = next(i for i, block in enumerate(blocks) if block.startswith(f"| {_HEADS[at]} |"))
    after = here + 1 + blocks[here + 1].startswith(_ABSENT[at].split("{")[0])
    return tuple("\n\n".join(part) for part in (blocks[:here], blocks[here:after], blocks[after:]))


def committed(page: str, docs: Path = REPO / "docs") -> dict[str, list[str]]:
    """The rows of a page's table, its head too: first cell -> the others."""
    _, text, _ = _around((docs / page).read_text("utf-8"), page.startswith("zh/"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def write(docs: Path, cells: Mapping, absent: list[str], columns: list[Column]) -> None:
    """Put the table into both pages, in place of the one that stands there."""
    for chinese, page in enumerate(PAGES):
        before, _, after = _around((docs / page).read_text("utf-8"), bool(chinese))
        (docs / page).write_text("\n\n".join([before, table(cells, absent, columns, bool(chinese)), after]), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("host", type=Path)
    parser.add_argument("--write", type=Path, metavar="DOCS", help="folder of the pages whose table is replaced")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries of every_family")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("a table of some families cannot be written")
    sys.argv[1:] = []  # ComfyUI parses the command line on import
    start(options.host.resolve())
    cells, absent = measured(options.only or list(TITLES), COLUMNS)
    if options.write:
        write(options.write, cells, absent, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
