"""Run a merge command over the golden cases and compare every tensor of its output.

    python tests/golden/check.py ["COMMAND {adapter} {base} -o {out} --strength {m} --mode {mode}"] [--only TEXT]

Without a command, ours is run. A tensor that the tool changed passes if ||got - want|| / ||want - base|| and max |got - want| stay
within the tolerances of its case; a tensor that it left alone must equal the base. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

CASES = Path(__file__).resolve().parent / "cases"
REPO = CASES.parent.parent.parent

#: What our modes can reproduce of each meaning of a multiplier; LyCORIS's own two are no mode of ours.
MODE = {"linear": "linear", "generator": "rotation", "comfy_core_squared": "core"}


@dataclass(frozen=True)
class Job:
    """One merge: which adapter at which multiplier in which mode gives which expected file."""

    case: str
    adapter: str
    expected: str
    multiplier: float
    mode: str

    @property
    def folder(self) -> Path:
        return CASES / self.case

    @property
    def name(self) -> str:
        return f"{self.case}/{self.expected.removesuffix('.safetensors')}/{self.mode}/{self.adapter}"


def case_info(case: str) -> dict:
    return json.loads((CASES / case / "case.json").read_text("utf-8"))


def jobs() -> Iterator[Job]:
    """Every expected file that a mode of ours reproduces; further adapters of a case (a pickle) at multiplier 1."""
    for case in sorted(p.name for p in CASES.iterdir() if (p / "case.json").is_file()):
        info = case_info(case)
        for i, adapter in enumerate(info["adapters"]):
            for expected, entry in info["strengths"].items():
                if entry["semantics"] in MODE and (i == 0 or entry["multiplier"] == 1):
                    yield Job(case, adapter, expected, entry["multiplier"], MODE[entry["semantics"]])


def faults(got: Mapping[str, Tensor], want: Mapping[str, Tensor], base: Mapping[str, Tensor], tolerance: Mapping) -> list[str]:
    """One sentence for every tensor that is missing, of another shape, not finite, or outside the tolerances."""
    found = [f"{key}: missing" for key in want if key not in got]
    found += [f"{key}: neither in the base nor expected" for key in got if key not in want]
    for key in sorted(set(want) & set(got)):
        g, w, b = got[key].double(), want[key].double(), base[key].double()
        if g.shape != w.shape:
            found.append(f"{key}: shape {tuple(g.shape)}, not {tuple(w.shape)}")
        elif not bool(torch.isfinite(g).all()):
            found.append(f"{key}: not finite")
        elif torch.equal(w, b):
            if not torch.equal(g, b):
                found.append(f"{key}: changed although it must not")
        else:
            relative = ((g - w).norm() / (w - b).norm()).item()
            largest = (g - w).abs().max().item()
            if relative > tolerance["rel"] or largest > tolerance["max_abs"]:
                left = ", left unchanged" if torch.equal(g, b) else ""
                found.append(f"{key}: relative error {relative:.1e}, largest {largest:.1e}{left}")
    return found


def command(template: str, job: Job, out: Path) -> list[str]:
    """The template as an argument list, placeholders replaced inside each argument."""
    values = {
        "adapter": job.folder / job.adapter, "base": job.folder / "base.safetensors", "out": out,
        "m": f"{job.multiplier:g}", "mode": job.mode,
    }
    return [token.format(**values) for token in shlex.split(template)]


def check(job: Job, out: Path) -> list[str]:
    """Faults of the file ``out`` as the result of ``job``."""
    return faults(
        load_file(out), load_file(job.folder / job.expected), load_file(job.folder / "base.safetensors"),
        case_info(job.case)["tolerance"],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = f"{shlex.quote(sys.executable)} -m oft_core merge {{adapter}} {{base}} -o {{out}} --strength {{m}} --mode {{mode}} --allow-pickle"
    parser.add_argument("command", nargs="?", default=ours)
    parser.add_argument("--only", default="", help="only jobs whose name contains this text")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one command")
    args = parser.parse_args()
    failed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs():
            if args.only not in job.name:
                continue
            total += 1
            out = Path(folder) / f"{total}.safetensors"
            run = subprocess.run(
                command(args.command, job, out), capture_output=True, text=True, timeout=args.timeout, cwd=REPO, check=False
            )
            if run.returncode or not out.is_file():
                lines = (run.stderr or run.stdout).strip().splitlines() or ["no message"]
                found = [f"exit status {run.returncode}: {lines[-1]}"]
            else:
                found = check(job, out)
            failed += bool(found)
            print(f"{'FAIL' if found else 'ok  '} {job.name}", *found[:3], sep="\n     ", flush=True)
    print(f"{total - failed} of {total} passed")
    return 1 if failed or not total else 0


if __name__ == "__main__":
    sys.exit(main())
