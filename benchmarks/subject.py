"""Does it teach, and what does it cost? Unseen subjects, taught to the embedded model by several methods.

    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject.py WORK --grid        learning rates, on other subjects
    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject.py WORK --minutes 60  the runs; goes on where it stopped
    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject.py WORK --every-rate 12 --methods subject lora16-match
    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject.py WORK --guide       the settings of docs/training.md
    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject.py WORK --report docs tables and plots of what there is

WORK is the folder of ``python -m embedded.make.pictures`` (its pictures train the encoder that measures).
Results are lines of WORK/subject/results.jsonl, one for each run; a run that is there is not repeated. All
methods train the same layers (the attention projections) of the same frozen model in float32 on the same
pictures, captions, order, noise and noise levels, with AdamW, and are judged on pictures drawn from equal
noise. Ours is trained by the pack's own engine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import subject_metrics as metrics
from subject_lines import (
    GRID_STEPS,
    LONG_STEPS,
    RATE_STEPS,
    STEPS,
    balance,
    finished,
    key_of,
    made_by,
    normalised,
    rate_lines,
    read,
    sheet_name,
)
from subject_methods import CONTROL, GUIDE, GUIDE_PICTURES, GUIDE_STEPS, METHODS, method_of
from subject_report import write
from subject_task import (
    BATCH,
    CFG,
    DRAW_STEPS,
    PICTURES,
    SHIFT,
    Task,
    World,
    asked,
    task_texts,
    view_captions,
)

from embedded import model as shipped
from embedded.captions import Concept
from embedded.pictures import cutout, subjects, view
from oft_core.training.objective import shifted

GRID_SUBJECTS = ("castle", "owl", "guitar")  # for choosing learning rates; never reported
SUBJECTS = 12  # behind the reported numbers


# ---------------------------------------------------------------- measuring


@dataclass
class Judge:
    """Draws and measures one subject with any weights, against the frozen model's own pictures."""

    world: World
    space: metrics.Known
    task: Task
    base: dict[str, float] = field(init=False)
    ceilings: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        groups = task_texts(self.task.subject)
        self.texts = [t for part in groups.values() for t in part]
        ends = torch.tensor([0, *(len(part) for part in groups.values())]).cumsum(0).tolist()
        self.part = {name: slice(a, b) for name, a, b in zip(groups, ends, ends[1:], strict=False)}
        generator = torch.Generator().manual_seed(1000 + self.task.seed)
        self.noise = torch.randn(len(self.texts), 16, 8, 8, generator=generator)
        self.levels = shifted(torch.linspace(0.1, 0.9, 5), SHIFT).repeat_interleave(len(self.task.held))
        self.held_noise = torch.randn(len(self.levels), 16, 8, 8, generator=generator)
        # What a perfect learner could reach, as the autoencoder shows it: the training views, and the subject
        # with the backgrounds and places that are asked for.
        composed = self.world.encode(metrics.as_tensor(self._composed()))
        could = {"similarity": self.task.train, "carried": composed}
        self.ceilings = {
            name: round(metrics.similarity(self.space, self.world.decode(latents), self.task.subject), 6)
            for name, latents in could.items()
        }
        modules = self.world.network.core.named_modules()
        self.own_weights = {n: m.weight.data for n, m in modules if isinstance(m, nn.Linear)}
        self.frozen = self.world.decode(self.world.draw(self.texts, self.noise))
        self.unlike = metrics.spread(self.frozen[self.part["other"]])
        self.base = self._row(self.frozen, {})

    def _composed(self) -> list[np.ndarray]:
        """The subject as the captions of `follow` say, uint8 [64, 64, 3] each."""
        art, out = cutout(self.task.subject), []
        for text in self.texts[self.part["follow"]]:
            _, colour, place = asked(text)
            colour, place = (None if word in ("white", "whole") else word for word in (colour, place))
            out.append(view(art, colour=colour, place=place))
        return out

    def look(self, weights: dict[str, Tensor]) -> tuple[dict[str, float], Tensor]:
        """All measures with these weights, and the pictures [34, 3, 64, 64]."""
        with self.world.carrying(weights):
            pictures = self.world.decode(self.world.draw(self.texts, self.noise))
            return self._row(pictures, weights), pictures

    def _row(self, pictures: Tensor, weights: dict[str, Tensor]) -> dict[str, float]:
        """similarity: to the held-out views; leak, carried: the same of pictures of the bare class word,
        and of the subject with backgrounds and places. drift: RMSE to the frozen model's pictures over the
        RMSE between its pictures of different captions. Shares in 0..1: recognised, other_right (concept),
        colour, place, follow (colour, place and subject). gram: relative change of W W^T.
        """
        subject = self.task.subject
        embedded = self.space.embed(pictures)
        nearest = self.space.nearest(embedded)
        drift = metrics.rmse(pictures, self.frozen) / self.unlike
        wanted = [asked(t) for t in self.texts]
        part = {name: range(s.start, s.stop) for name, s in self.part.items()}
        colours, where = (
            metrics.backgrounds(pictures[self.part["follow"]]),
            metrics.places(pictures[self.part["follow"]]),
        )
        coloured = [c == wanted[i][1] for i, c in zip(part["follow"], colours, strict=True)]
        placed = [p == wanted[i][2] for i, p in zip(part["follow"], where, strict=True)]
        mine = [nearest[i] == subject.name for i in part["follow"]]
        in_place = [p or wanted[i][2] == "whole" for i, p in zip(part["follow"], placed, strict=True)]

        def share(values: Iterable[bool]) -> float:
            values = list(values)
            return sum(values) / len(values)

        row = {
            "similarity": metrics.similarity(self.space, pictures[self.part["subject"]], subject),
            "recognised": share(nearest[i] == subject.name for i in part["subject"]),
            "leak": metrics.similarity(self.space, pictures[self.part["class"]], subject),
            "class_drift": drift[self.part["class"]].mean().item(),
            "drift": drift[self.part["other"]].mean().item(),
            "other_right": share(nearest[i] == wanted[i][0] for i in part["other"]),
            "colour": share(
                c for i, c in zip(part["follow"], coloured, strict=True) if wanted[i][1] != "white"
            ),
            "place": share(p for i, p in zip(part["follow"], placed, strict=True) if wanted[i][2] != "whole"),
            "follow_recognised": share(mine),
            "carried": metrics.similarity(self.space, pictures[self.part["follow"]], subject),
            "follow": share(a and b and c for a, b, c in zip(coloured, in_place, mine, strict=True)),
            "diversity": metrics.spread(pictures[self.part["subject"]]),
            "held_loss": self._loss(),
        }
        changed = []
        for name, weight in weights.items():
            before = self.own_weights[name]
            gram = before @ before.T
            changed.append(((weight @ weight.T - gram).norm() / gram.norm()).item())
        row["gram"] = max(changed, default=0.0)
        return {k: round(v, 6) if k != "gram" else v for k, v in row.items()}

    def _loss(self) -> float:
        """Denoising error on the held-out views at five levels, always the same noise."""
        clean = self.task.held.repeat(5, 1, 1, 1)
        texts = view_captions(self.task.subject, metrics.HELD_VIEWS) * 5
        s = self.levels[:, None, None, None]
        with torch.no_grad():
            answer = self.world.velocity(
                (1 - s) * clean + s * self.held_noise, self.levels, texts
            )
        return (answer - (self.held_noise - clean)).square().mean().item()


# ---------------------------------------------------------------- runs


@dataclass(frozen=True)
class Job:
    """One line of the results."""

    stage: str
    method: str
    lr: float
    subject: str
    seed: int
    steps: tuple[int, ...]
    batch: int = BATCH
    pictures: int = PICTURES

    @property
    def key(self) -> tuple:
        return (self.method, f"{self.lr:g}", self.subject, self.seed, self.batch, self.pictures)


def grid_jobs(methods: Iterable[str], count: int, batch: int) -> list[Job]:
    """Every learning rate of every method on the first `count` subjects that are kept for it."""
    tried = [(m, lr) for m in methods if not isinstance(METHODS[m].grid, str) for lr in METHODS[m].grid]
    return [Job("grid", m, lr, s, 0, GRID_STEPS, batch) for s in GRID_SUBJECTS[:count] for m, lr in tried]


def reported_subjects() -> list[Concept]:
    """The subjects behind the reported numbers, in the order in which they are run."""
    rest = sorted((s for s in subjects() if s.name not in GRID_SUBJECTS), key=lambda s: s.name)
    return random.Random(0).sample(rest, len(rest))


def main_jobs(
    methods: Iterable[str], rates: dict[str, float], count: int, seeds: Iterable[int], long: int, **more: int
) -> list[Job]:
    """All methods for the first subject and seed, then for the next subject: what is done is balanced.

    `long` of the subjects have long runs: every third one first.
    """
    out, chosen = [], reported_subjects()[:count]
    far = sorted(range(count), key=lambda i: (i % 3 != 2, i))[:long]
    for seed in seeds:
        for i, s in enumerate(chosen):
            steps = LONG_STEPS if i in far else STEPS
            out += [Job("main", m, rates[m], s.name, seed, steps, **more) for m in methods]
    return out


def rate_jobs(methods: Iterable[str], count: int, seeds: Iterable[int], batch: int) -> list[Job]:
    """Every learning rate of the methods on the first reported subjects: no method's rate is chosen by these."""
    tried = [(m, lr) for m in methods if not isinstance(METHODS[m].grid, str) for lr in METHODS[m].grid]
    names = [s.name for s in reported_subjects()[:count]]
    return [Job("rates", m, lr, s, seed, RATE_STEPS, batch) for seed in seeds for s in names for m, lr in tried]


def guide_jobs(count: int) -> list[Job]:
    """All settings of the guide for its first subject, then for the next; none is a subject of the evaluation."""
    names = [s.name for s in reported_subjects()[SUBJECTS:]]
    variants = [(m, PICTURES) for m in GUIDE] + [("guide", n) for n in GUIDE_PICTURES]
    return [
        Job("guide", m, GUIDE[m].grid[0], s, 0, GUIDE_STEPS, BATCH, n) for s in names[:count] for m, n in variants
    ]


def chosen_rates(lines: list[dict[str, Any]], methods: Iterable[str] = tuple(METHODS)) -> dict[str, float]:
    """Every method's learning rate: the one with the best balance, at its best checkpoint, over subjects.

    Only subjects on which the whole grid of a method was run count. Raises ValueError where there is none.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for line in lines:
        if line["stage"] == "grid":
            best = max(balance(row, line) for row in line["rows"])
            found.setdefault(line["method"], {}).setdefault(line["subject"], {})[line["lr"]] = best
    out = {}
    for name in methods:
        grid = METHODS[name].grid
        source = grid if isinstance(grid, str) else name
        rates = METHODS[source].grid
        if len(rates) == 1:
            out[name] = rates[0]
            continue
        whole = [tried for tried in found.get(source, {}).values() if set(rates) <= set(tried)]
        if not whole:
            raise ValueError(f"no whole grid of learning rates for {source}: run with --grid first")
        out[name] = max(rates, key=lambda lr, whole=whole: sum(tried[lr] for tried in whole))
    return out


def run(
    job: Job,
    world: World,
    space: metrics.Known,
    judges: dict[tuple, Judge],
    show: Path | None = None,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train and measure one job: its line of the results.

    known: a line of the same run with fewer steps. What it says is not measured again, only its last checkpoint:
    where that comes out otherwise (another machine), everything is. Its sheet is left as it is.
    """
    subject = next(s for s in subjects() if s.name == job.subject)
    which = (job.subject, job.seed, job.batch, job.pictures)
    if which not in judges:
        judges.clear()
        task = Task.of(world, subject, job.seed, job.batch, job.pictures)
        judges[which] = Judge(world, space, task)
    judge = judges[which]
    learner = method_of(job.method).make(world, judge.task, job.lr)
    rows, control, sheet, seconds = [], [], [judge.frozen], 0.0
    before = known["rows"][-1]["step"] if known else 0
    for step in job.steps:
        if step < before:
            continue
        begun = time.process_time()
        learner.advance(step)
        seconds += time.process_time() - begun
        row, pictures = judge.look(learner.weights())
        row = {"step": step, **row, **learner.facts()}
        if known and step == before:
            if row != known["rows"][-1]:
                print(f"{job.key}: not as it was after {step} steps; measured anew", file=sys.stderr, flush=True)
                return run(job, world, space, judges, show)
            rows, control = list(known["rows"]), list(known["control"])
            continue
        rows.append(row)
        sheet.append(pictures)
        if job.method == CONTROL:
            control.append({"step": step, **judge.look(learner.random_weights())[0]})
    if show is not None and not known:
        _save_sheet(
            show / sheet_name(job.stage, job.subject, job.seed, job.method, job.lr, job.pictures), sheet
        )
    return {
        "stage": job.stage, "weights": world.digest, "encoder": space.digest, "method": job.method,
        "lr": job.lr, "subject": job.subject, "seed": job.seed, "batch": job.batch, "pictures": job.pictures,
        "draw": [DRAW_STEPS, CFG], "ceilings": judge.ceilings,
        "base": judge.base, "rows": rows, "control": control, "train_cpu_seconds": round(seconds, 2),
    }  # fmt: skip


def _save_sheet(path: Path, rows: list[Tensor]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    Image.fromarray((whole * 255).round().byte().permute(1, 2, 0).numpy()).save(path, optimize=True)


def work_through(
    jobs: list[Job],
    done: dict[tuple, int],
    minutes: float,
    run_one: Callable[[Job], dict[str, Any]],
    results: Path,
) -> int:
    """Run what is not `done` (see `finished`), a line each; begin nothing that would last beyond `minutes`.

    Returns how many runs are left.
    """
    begun, longest = time.monotonic(), {}
    left = [job for job in jobs if done.get(job.key, 0) < job.steps[-1]]
    while left:
        job = left[0]
        passed = time.monotonic() - begun
        if passed + longest.get(len(job.steps), 0.0) > minutes * 60:
            break
        line = run_one(job)
        took = time.monotonic() - begun - passed
        longest[len(job.steps)] = max(took, longest.get(len(job.steps), 0.0))
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        left.pop(0)
        last = line["rows"][-1]
        fidelity = normalised(last["similarity"], line)
        said = f"fidelity {fidelity:.2f}, drift {last['drift']:.2f}, follows {last['follow']:.2f}"
        which = f"{job.stage} {job.subject} {job.seed} {job.method} {job.lr:g}"
        print(f"{which}: {said}; {took:.0f} s, {len(left)} left", flush=True)
    return len(left)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--grid", action="store_true", help="try learning rates on the subjects kept for it")
    parser.add_argument("--grid-subjects", type=int, default=2)
    parser.add_argument("--every-rate", type=int, metavar="SUBJECTS", help="every rate on that many reported subjects")
    parser.add_argument("--guide", action="store_true", help="run the settings that docs/training.md compares")
    parser.add_argument("--guide-subjects", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--subjects", type=int, default=SUBJECTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--long", type=int, default=SUBJECTS, help="how many subjects have runs of 2,000 steps")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="training views of a subject")
    parser.add_argument(
        "--rates", nargs="+", default=[], metavar="METHOD=RATE", help="learning rates, where no grid was run"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--transformer", type=Path, help="other weights than the shipped ones, with --autoencoder"
    )
    parser.add_argument("--autoencoder", type=Path)
    parser.add_argument("--report", type=Path, help="write tables and plots into this folder and stop")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = options.work / "subject"
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    if options.report:
        write(read(results), options.report, folder / "sheets")
        return
    space = metrics.known(options.work, folder)
    right, margin = metrics.retrieval(space)
    said = f"{right:.1%} of the unseen subjects' training views find their held-out views"
    print(f"encoder: {said} among {len(space.names)} concepts; margin {margin:.2f}", flush=True)
    if options.transformer:
        from safetensors.torch import load_file

        world = World(load_file(options.transformer), load_file(options.autoencoder))
    else:
        world = World(shipped.transformer(), shipped.read("autoencoder.safetensors"))
    lines = [x for x in read(results) if made_by(x) == (world.digest, space.digest)]
    if options.grid:
        stage, jobs = "grid", grid_jobs(options.methods, options.grid_subjects, options.batch)
    elif options.every_rate:
        stage, jobs = "rates", rate_jobs(options.methods, options.every_rate, options.seeds, options.batch)
    elif options.guide:
        stage, jobs = "guide", guide_jobs(options.guide_subjects)
    else:
        stage, mine = "main", [x for x in lines if x["batch"] == options.batch]
        given = {name: float(rate) for name, rate in (text.split("=") for text in options.rates)}
        rates = given | chosen_rates(mine, [m for m in options.methods if m not in given])
        print("learning rates: " + ", ".join(f"{m} {rates[m]:g}" for m in options.methods))
        more = {"batch": options.batch, "pictures": options.pictures}
        jobs = main_jobs(options.methods, rates, options.subjects, options.seeds, options.long, **more)
    done = finished(rate_lines(lines) if stage == "rates" else (x for x in lines if x["stage"] == stage))
    judges: dict[tuple, Judge] = {}
    sheets = folder / "sheets"
    known = {key_of(x): x for x in lines if x["stage"] == stage}

    def run_one(job: Job) -> dict[str, Any]:
        return run(job, world, space, judges, sheets, known.get(job.key))

    left = work_through(jobs, done, options.minutes, run_one, results)
    print(f"{left} of {len(jobs)} runs are left" if left else f"all {len(jobs)} runs are there")


if __name__ == "__main__":
    main()
