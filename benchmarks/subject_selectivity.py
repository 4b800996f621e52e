"""Whom does a trained change reach? The same question to every method: how much more it acts on the subject's own words.

    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject_selectivity.py WORK --report docs

WORK as for benchmarks/subject.py, with its learning rates. Each method is trained on subjects that are in no other
table; then the frozen model reads four kinds of captions, and each layer's change is measured on what that layer
gets: root mean square of (W' - W) x over that of W x. A change that only the subject's caption feels can be strong
without moving other captions. Prints a table and writes it into REPORT/evaluation.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import subject as runs
import subject_methods
import subject_report as report
import subject_task

STEPS = 200
LEVELS = (0.95, 0.8, 0.5)  # of noise, at which the captions are read
KINDS = ("own", "follow", "class", "other")  # captions: what was taught; with backgrounds and places; class; others
BEGIN, END = "<!-- table of benchmarks/subject_selectivity.py -->", "<!-- end of that table -->"
METHODS = ("subject", "oft16", "oft32-match", "lora4", "lora16", "lora16-match", "core", "lycoris")
BLOCKS = (8, 64, 192)
BLOCK_RATE = 3e-3


def inputs(world: subject_task.World, texts: list[str]) -> dict[str, Tensor]:
    """Layer -> what it gets while the frozen model reads the captions from fixed noise, [tokens, channels].

    Of a caption only its own tokens: it is filled up to a multiple of four.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in world.layers}
    length = 0

    def keep(name: str) -> Callable[..., None]:
        return lambda module, given: found[name].append(
            given[0][0, : length if "context_block" in name else None].clone()
        )

    hooks = [world.network.core.get_submodule(n).register_forward_pre_hook(keep(n)) for n in world.layers]
    noise = torch.randn(len(texts), 16, 8, 8, generator=torch.Generator().manual_seed(5))
    try:
        with torch.no_grad():
            for level in LEVELS:
                for i, text in enumerate(texts):
                    length = int(world.captions.length[world.number[text]])
                    world.velocity(noise[i : i + 1], torch.tensor([level]), [text])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def reach(before: Tensor, after: Tensor, x: Tensor) -> float:
    """Root mean square of (after - before) x over that of before x; weights [out, in], x [tokens, in]."""
    return ((x @ (after - before).T).norm() / (x @ before.T).norm()).item()


def reaches(
    before: dict[str, Tensor], after: dict[str, Tensor], given: dict[str, dict[str, Tensor]], stream: str
) -> dict[str, float]:
    """Kind of caption -> mean `reach` over the changed layers of a stream ("context_block": text, "x_block": picture)."""
    layers = [n for n, w in after.items() if stream in n and not torch.equal(w, before[n])]
    return {
        kind: statistics.fmean(reach(before[n], after[n], x[n]) for n in layers) for kind, x in given.items()
    }


def measured(world: subject_task.World, subjects: int, rates: dict[str, float]) -> list[list[str]]:
    """Rows of the table, means over the subjects."""
    made = {subject_methods.METHODS[m].label: (subject_methods.METHODS[m].make, rates[m]) for m in METHODS}
    for size in BLOCKS:
        made[f"OFT b{size}, preset subject (ours)"] = (subject_methods.preset_method("subject", oft_block_size=size), BLOCK_RATE)
    names = [s.name for s in runs.reported_subjects()[runs.SUBJECTS :]][:subjects]
    before = world.effective()
    found: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {label: [] for label in made}
    for concept in (s for s in runs.subjects() if s.name in names):
        task, texts = subject_task.Task.of(world, concept, 0), subject_task.task_texts(concept)
        asked = {"own": texts["subject"][:4], **{kind: texts[kind] for kind in KINDS[1:]}}
        given = {kind: inputs(world, some) for kind, some in asked.items()}
        for label, (make, lr) in made.items():
            learner = make(world, task, lr)
            learner.advance(STEPS)
            after = learner.weights()
            found[label].append(tuple(reaches(before, after, given, s) for s in ("context_block", "x_block")))
            print(concept.name, label, {k: round(v, 3) for k, v in found[label][-1][0].items()}, flush=True)
    rows = []
    for label, (_, lr) in made.items():
        text, picture = ([pair[i] for pair in found[label]] for i in (0, 1))
        cells = [f"{statistics.fmean(t[kind] for t in text):.2f}" for kind in KINDS]
        for some in (text, picture):
            cells.append(f"{statistics.fmean(t['own'] / t['other'] for t in some):.1f}")
        rows.append([label, f"{lr:g}", *cells])
    return rows


def table(rows: list[list[str]], subjects: int) -> str:
    head = ["method", "lr", "subject's caption", "with backgrounds and places", "class", "other captions"]
    head += ["subject / others, text", "subject / others, picture"]
    return f"{report.markdown(head, rows)}\n\n(Mean of {subjects} subjects, {STEPS} steps.)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--report", type=Path, help="the folder of evaluation.md")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = subject_task.World(runs.shipped.transformer(), runs.shipped.read("autoencoder.safetensors"))
    lines = [x for x in runs.read(options.work / "subject" / "results.jsonl") if x["weights"] == world.digest]
    lines = report.comparable(lines)
    text = table(measured(world, options.subjects, runs.chosen_rates(lines, METHODS)), options.subjects)
    print(text)
    if options.report:
        path = options.report / "evaluation.md"
        report.put(path, report.between(path, path.read_text("utf-8"), BEGIN, END, text))


if __name__ == "__main__":
    main()
