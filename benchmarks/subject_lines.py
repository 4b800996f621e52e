"""What a line of benchmarks/subject.py's results is: when it was measured, which run it is of, and what is read off it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from subject_methods import TWINS

GRID_STEPS = (50, 100, 200, 400)
# Dense where most methods learn: fidelity rises from a fifth to four fifths within 30 steps, so that a line between
# distant checkpoints would say little about what is reached at a level between them.
STEPS = (10, 15, 20, 25, 35, 50, 75, 100, 200, 400)
LONG_STEPS = (*STEPS, 1000, 2000)
RATE_STEPS = (*STEPS, 1000)


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a results file; a line that was cut off by an interruption is left out, and of a run
    that was made again with more steps the shorter one.
    """
    out: dict[tuple, dict[str, Any]] = {}
    for text in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            print(f"{path}: an incomplete line is left out", file=sys.stderr)
            continue
        key = (line["stage"], *made_by(line), *key_of(line))
        if key not in out or out[key]["rows"][-1]["step"] < line["rows"][-1]["step"]:
            out[key] = line
    return list(out.values())


def key_of(line: dict[str, Any]) -> tuple:
    """As `Job.key`."""
    names = ("subject", "seed", "batch", "pictures")
    return (line["method"], f"{line['lr']:g}", *(line[name] for name in names))


def made_by(line: dict[str, Any]) -> tuple[str, str]:
    """Digests of the weights that were trained on and of the encoder that measured: only equal ones compare."""
    return line["weights"], line["encoder"]


def finished(lines: Iterable[dict[str, Any]]) -> dict[tuple, int]:
    """Key of a run -> how many steps it had."""
    out: dict[tuple, int] = {}
    for line in lines:
        out[key_of(line)] = max(line["rows"][-1]["step"], out.get(key_of(line), 0))
    return out


def rate_lines(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines on reported subjects, at the chosen rates and at others; see `TWINS` for the names in them."""
    return [x | {"method": TWINS.get(x["method"], x["method"])} for x in lines if x["stage"] in ("rates", "main")]


def balance(row: dict[str, float], line: dict[str, Any]) -> float:
    """Harmonic mean of fidelity and of what is kept of the prior, 0..1: what a learning rate is chosen by."""
    fidelity, kept = min(max(normalised(row["similarity"], line), 0.0), 1.0), max(1 - row["drift"], 0.0)
    return 2 * fidelity * kept / (fidelity + kept) if fidelity + kept else 0.0


def normalised(similarity: float, line: dict[str, Any], of: str = "similarity") -> float:
    """Similarity to the held-out views: 0 as the frozen model's pictures, 1 as the subject itself.

    `of`: which pictures are meant: their similarity of the frozen model counts as 0. The subject itself is its
    training views, for "carried" the subject with the backgrounds and places that were asked for.
    """
    low = line["base"][of]
    return (similarity - low) / (line["ceilings"].get(of, line["ceilings"]["similarity"]) - low)


def sheet_name(stage: str, subject: str, seed: int, method: str, lr: float, pictures: int) -> str:
    """File of a run's pictures: a row for the frozen model and for every checkpoint, 34 columns of 64 px."""
    return f"{stage}-{subject}-{seed}-{method}-{lr:g}-{pictures}.png"
