"""Tables and plots of benchmarks/subject.py's results. Every number comes with its count of subjects."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from subject_lines import (
    GRID_STEPS,
    LONG_STEPS,
    RATE_STEPS,
    STEPS,
    balance,
    made_by,
    normalised,
    rate_lines,
    sheet_name,
)
from subject_methods import CONTROL, GUIDE_STEPS, GUIDE_TABLES, METHODS
from subject_task import BATCH, PICTURES

from oft_core.atomic import atomically

Line = dict[str, Any]
Row = dict[str, float]
BEGIN, END = "<!-- tables of benchmarks/subject.py -->", "<!-- end of the tables -->"
GUIDE_BEGIN, GUIDE_END = "<!-- guide: {} -->", "<!-- end of guide: {} -->"  # around each table of training.md
LONG_MEASURES = ("fidelity", "drift", "class_drift", "kept", "carried", "follow")
LEVELS = (0.7, 0.85)  # of fidelity, at which methods are compared
REFERENCE = "lora16"
BESIDE = ("subject", "lora16", "lora16-match")  # shown again beside methods run on fewer subjects
# In the plots; the tables have every method. More lines could not be told apart.
OURS_PLOTTED = ("oft32", "oft32-match", "subject", "default", "subject-text")
THEIRS_PLOTTED = ("lora16", "lora16-match", "lora16-text", "core", "lycoris")
COMPARED = ("drift", "carried", "follow")  # with REFERENCE, subject by subject
FEW = 6  # subjects; below that an interval would say nothing

MEASURES: dict[str, tuple[str, Callable[[Row, Line], float]]] = {
    "fidelity": ("fidelity", lambda r, x: normalised(r["similarity"], x)),
    "recognised": ("recognised", lambda r, x: r["recognised"]),
    "drift": ("drift", lambda r, x: r["drift"]),
    "kept": ("others right", lambda r, x: r["other_right"]),
    "leak": ("leak", lambda r, x: normalised(r["leak"], x, "leak")),
    "class_drift": ("class drift", lambda r, x: r["class_drift"]),
    "carried": ("carried over", lambda r, x: normalised(r["carried"], x, "carried")),
    "follow": ("follows", lambda r, x: r["follow"]),
    "colour": ("colour", lambda r, x: r["colour"]),
    "place": ("place", lambda r, x: r["place"]),
    "diversity": ("diversity", lambda r, x: r["diversity"]),
    "held_loss": ("held-out loss", lambda r, x: r["held_loss"]),
}


def balanced(lines: Iterable[Line], methods: Iterable[str]) -> list[Line]:
    """Only the (subject, seed) pairs that every one of the methods has."""
    lines, methods = list(lines), set(methods)
    have: dict[tuple[str, int], set[str]] = {}
    for x in lines:
        have.setdefault((x["subject"], x["seed"]), set()).add(x["method"])
    return [x for x in lines if x["method"] in methods and methods <= have[x["subject"], x["seed"]]]


def comparable(lines: Iterable[Line]) -> list[Line]:
    """The lines of those weights and that encoder that most have."""
    lines = list(lines)
    most = Counter(map(made_by, lines)).most_common(1)
    return [x for x in lines if made_by(x) == most[0][0]]


def widest(lines: list[Line]) -> list[list[str]]:
    """Methods that were run on equally many (subject, seed) pairs, or on one less: most pairs first."""
    count = {m: len({(x["subject"], x["seed"]) for x in lines if x["method"] == m}) for m in METHODS}
    left, out = [m for m in METHODS if count[m]], []
    while left:
        enough = max(count[m] for m in left) - 1
        out.append([m for m in left if count[m] >= enough])
        left = [m for m in left if count[m] < enough]
    return out


def row_at(line: Line, step: int) -> Row | None:
    return next((r for r in line["rows"] if r["step"] == step), None)


def per_subject(lines: Iterable[Line], value: Callable[[Line], float | None]) -> dict[str, float]:
    """Subject -> mean of a value over its seeds; lines where the value is None do not count."""
    found: dict[str, list[float]] = {}
    for x in lines:
        v = value(x)
        if v is not None:
            found.setdefault(x["subject"], []).append(v)
    return {s: statistics.fmean(v) for s, v in found.items()}


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over subjects."""
    values = list(values)
    if not values:
        return "-"
    return f"{statistics.fmean(values):.2f}" + (
        f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    )


def at_level(line: Line, level: float) -> Row | None:
    """All measures where a run first reaches a fidelity, linear between checkpoints (the frozen model is
    step 0).

    None where the run does not reach it.
    """
    points = [{**line["base"], "step": 0}, *line["rows"]]
    values = [{"step": p["step"], **{k: f(p, line) for k, (_, f) in MEASURES.items()}} for p in points]
    for a, b in itertools.pairwise(values):
        if b["fidelity"] >= level:
            t = (
                min(max((level - a["fidelity"]) / (b["fidelity"] - a["fidelity"]), 0.0), 1.0)
                if b["fidelity"] > a["fidelity"]
                else 1.0
            )
            return {k: a[k] + t * (b[k] - a[k]) for k in a}
    return None


def interval(differences: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, 4,000 resamples, seeded."""
    values = np.array(differences)
    picks = np.random.default_rng(0).integers(0, len(values), (4000, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def compared(differences: list[float]) -> str:
    """Mean difference over subjects, with an interval where there are enough of them for one."""
    mean, count = f"{statistics.fmean(differences):+.2f}", len(differences)
    if count < FEW:
        return f"{mean} ({count} subjects)"
    low, high = interval(differences)
    return f"{mean} [{low:+.2f}, {high:+.2f}]"


# ---------------------------------------------------------------- tables


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)])


def _of(lines: list[Line], method: str) -> list[Line]:
    return [x for x in lines if x["method"] == method]


def step_table(lines: list[Line], methods: list[str], step: int) -> str:
    rows = []
    for m in methods:
        mine = [x for x in _of(lines, m) if row_at(x, step)]
        if not mine:
            continue
        cells = [
            spread(per_subject(mine, lambda x, f=f: f(row_at(x, step), x)).values())
            for _, f in MEASURES.values()
        ]
        rows.append([METHODS[m].label, f"{mine[0]['lr']:g}", *cells, str(len({x["subject"] for x in mine}))])
    return markdown(["method", "lr", *(name for name, _ in MEASURES.values()), "subjects"], rows)


def level_table(groups: dict[tuple[str, ...], list[Line]], level: float, head: tuple[str, ...] = ("method",)) -> str:
    """A row for every group, its key in front under `head`; differences are to the main runs of REFERENCE."""
    names = ("drift", "class_drift", "kept", "carried", "follow", "diversity")
    found = {
        key: {n: per_subject(some, lambda x, n=n: (at_level(x, level) or {}).get(n)) for n in ("step", *names)}
        for key, some in groups.items()
    }
    # At its own rate, where there are several of it.
    own = (key for key, some in groups.items() if (some[0]["method"], some[0]["stage"]) == (REFERENCE, "main"))
    reference = next((found[key] for key in own), None)
    rows = []
    for key, some in groups.items():
        mine, differences = found[key], []
        for n in COMPARED:
            both = [v - reference[n][s] for s, v in mine[n].items() if s in reference[n]] if reference else []
            differences.append("-" if mine is reference or not both else compared(both))
        step = f"{statistics.median(mine['step'].values()):.0f}" if mine["step"] else "-"
        reached = f"{len(mine['step'])} of {len({x['subject'] for x in some})}"
        rows.append([*key, reached, step, *(spread(mine[n].values()) for n in names), *differences])
    columns = [*head, "reached by", "step (median)", *(MEASURES[n][0] for n in names)]
    return markdown([*columns, *(f"{MEASURES[n][0]} − LoRA 16" for n in COMPARED)], rows)


def by_method(lines: list[Line], methods: list[str]) -> dict[tuple[str, ...], list[Line]]:
    """Groups of `level_table`."""
    return {(METHODS[m].label,): _of(lines, m) for m in methods}


def long_table(lines: list[Line], methods: list[str]) -> str:
    rows = []
    last = LONG_STEPS[-1]
    for m in methods:
        mine = [x for x in _of(lines, m) if row_at(x, last)]
        if not mine:
            continue
        best = per_subject(mine, lambda x: max(normalised(r["similarity"], x) for r in x["rows"]))
        cells = []
        for name in LONG_MEASURES:
            f = MEASURES[name][1]
            cells += [
                spread(per_subject(mine, lambda x, f=f, s=s: f(row_at(x, s), x)).values())
                for s in (200, last)
            ]
        rows.append([METHODS[m].label, spread(best.values()), *cells, str(len(best))])
    head = ["method", "best fidelity"]
    head += [f"{MEASURES[n][0]} {s}" for n in LONG_MEASURES for s in (200, last)]
    return markdown([*head, "subjects"], rows)


def long_part(lines: list[Line], path: Path) -> str:
    """A table of what every method has, then of what some have more runs of, and a plot of most; empty without long runs."""
    parts, groups, plotted = [], widest(lines), 0
    for last in range(len(groups), 0, -1):
        shown = [m for m in METHODS if any(m in group for group in groups[:last])]
        some = balanced(lines, shown)
        if not some:
            continue
        pairs = {(x["subject"], x["seed"]) for x in some}
        seeds = sorted({seed for _, seed in pairs})
        named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        said = f"{len({s for s, _ in pairs})} subjects, {named}: {len(pairs)} runs a method"
        if len(some) > plotted:
            plot(some, shown, LONG_STEPS, path, said)
            plotted = len(some)
        parts.append(f"{said}.\n\n{long_table(some, shown)}")
    return "\n\n".join([f"### {LONG_STEPS[-1]:,} steps", *parts]) if parts else ""


def pictures_table(lines: list[Line]) -> str:
    """Methods also trained with another number of pictures or batch, on the subjects that all have."""
    rows = []
    for m in METHODS:
        groups: dict[tuple[int, int], list[Line]] = {}
        for x in _of(lines, m):
            groups.setdefault((x["pictures"], x["batch"]), []).append(x)
        if len(groups) < 2:
            continue
        shared = set.intersection(*({(x["subject"], x["seed"]) for x in some} for some in groups.values()))
        for (pictures, batch), some in sorted(groups.items()):
            some = [x for x in some if (x["subject"], x["seed"]) in shared]
            cells = []
            for step in (100, 200, 400):
                at = [(row_at(x, step), x) for x in some]
                names = ("fidelity", "drift", "carried")
                means = [statistics.fmean(MEASURES[n][1](r, x) for r, x in at) for n in names]
                cells.append(" / ".join(f"{v:.2f}" for v in means))
            rows.append([METHODS[m].label, str(pictures), str(batch), *cells, str(len(some))])
    steps = (f"fidelity / drift / carried over at {s}" for s in (100, 200, 400))
    return markdown(["method", "pictures", "batch", *steps, "runs"], rows) if rows else ""


def control_table(lines: list[Line]) -> str:
    mine = [x for x in _of(lines, CONTROL) if x["control"]]
    rows = []
    for step in LONG_STEPS:
        some = [x for x in mine if row_at(x, step)]
        if not some:
            continue
        cells = []
        for name in ("fidelity", "drift"):
            f = MEASURES[name][1]
            cells.append(spread(per_subject(some, lambda x, f=f, s=step: f(row_at(x, s), x)).values()))
            turned = [(x, next(r for r in x["control"] if r["step"] == step)) for x in some]
            values = [f(r, x) for x, r in turned]
            cells.append(spread(values) + f" (largest {max(values):.2f})")
        angle = spread(per_subject(some, lambda x, s=step: row_at(x, s)["angle_rms"]).values())
        rows.append([str(step), *cells, angle, str(len({x["subject"] for x in some}))])
    head = [
        "step",
        "fidelity",
        "fidelity, random planes",
        "drift",
        "drift, random planes",
        "angle (root mean square, °)",
        "subjects",
    ]
    return markdown(head, rows)


def geometry_table(lines: list[Line], methods: list[str]) -> str:
    rows = []
    for m in methods:
        every = [r for x in _of(lines, m) for r in x["rows"]]
        gram = max(r["gram"] for r in every)
        own = [r for r in every if "orthogonality" in r]
        error = f"{max(r['orthogonality'] for r in own):.1e}" if own else "-"
        angles = f"{max(r['angle_max'] for r in own):.0f}" if own else "-"
        seconds = [x["train_cpu_seconds"] / x["rows"][-1]["step"] * 1000 for x in _of(lines, m)]
        rows.append([METHODS[m].label, f"{gram:.1e}", error, angles, f"{statistics.median(seconds):.0f}"])
    return markdown(
        ["method", "largest change of W Wᵀ", "largest error of RᵀR = I", "largest angle, °", "ms of a step"],
        rows,
    )


def grid_table(lines: list[Line]) -> str:
    grid = [x for x in lines if x["stage"] == "grid"]
    rows = []
    for m in METHODS:
        mine = [] if isinstance(METHODS[m].grid, str) else _of(grid, m)
        # As for the choice: only subjects on which the whole grid was run.
        tried = {s: {x["lr"] for x in mine if x["subject"] == s} for s in {x["subject"] for x in mine}}
        mine = [x for x in mine if set(METHODS[m].grid) <= tried[x["subject"]]]
        for lr in sorted({x["lr"] for x in mine}):
            some = [x for x in mine if x["lr"] == lr]
            best = [max((balance(r, x), r["step"]) for r in x["rows"]) for x in some]
            cells = []
            for step in GRID_STEPS:
                at = [(row_at(x, step), x) for x in some]
                fidelity = statistics.fmean(normalised(r["similarity"], x) for r, x in at)
                cells.append(f"{fidelity:.2f} / {statistics.fmean(r['drift'] for r, _ in at):.2f}")
            mean = statistics.fmean(b for b, _ in best)
            rows.append([METHODS[m].label, f"{lr:g}", *cells, f"{mean:.2f}", str(len(some))])
    return markdown(
        ["method", "lr", *(f"fidelity / drift at {s}" for s in GRID_STEPS), "best balance", "subjects"], rows
    )


def rate_groups(lines: list[Line]) -> dict[tuple[str, float], list[Line]]:
    """(method, learning rate) -> runs up to the last of RATE_STEPS, on pairs of subject and seed that every rate of
    every such method has; then those of REFERENCE at its own rate.
    """
    several = {x["method"] for x in lines if x["stage"] == "rates"}
    out: dict[tuple[str, float], dict[tuple[str, int], Line]] = {}
    for x in rate_lines(lines):
        if x["method"] in (*several, REFERENCE) and row_at(x, RATE_STEPS[-1]):
            rows = [r for r in x["rows"] if r["step"] <= RATE_STEPS[-1]]
            out.setdefault((x["method"], x["lr"]), {})[x["subject"], x["seed"]] = {**x, "rows": rows}
    shared = set.intersection(*map(set, out.values())) if several and out else set()
    order = {m: i for i, m in enumerate(METHODS)}
    keys = sorted(out, key=lambda k: (k[0] not in several, order[k[0]], k[1]))
    return {k: [out[k][s] for s in sorted(shared)] for k in keys} if shared else {}


def rate_tables(groups: dict[tuple[str, float], list[Line]]) -> str:
    """A table for every level of fidelity, then one after equal steps."""
    named = {(METHODS[m].label, f"{lr:g}"): some for (m, lr), some in groups.items()}
    head = ("method", "lr")
    parts = [f"At equal fidelity {v:g}:\n\n{level_table(named, v, head)}" for v in LEVELS]
    measures = ("fidelity", "drift", "carried", "follow")

    def means(some: list[Line], step: int) -> str:
        values = (per_subject(some, lambda x, n=n: MEASURES[n][1](row_at(x, step), x)).values() for n in measures)
        return " / ".join(f"{statistics.fmean(v):.2f}" for v in values)

    steps = (STEPS[-1], RATE_STEPS[-1])
    said = " / ".join(MEASURES[n][0] for n in measures)
    rows = [[*key, *(means(some, s) for s in steps)] for key, some in named.items()]
    return "\n\n".join([*parts, "At equal steps:", markdown([*head, *(f"{said} after {s:,} steps" for s in steps)], rows)])


# ---------------------------------------------------------------- plots


def plot_rates(groups: dict[tuple[str, float], list[Line]], path: Path) -> None:
    """Carrying over against drift at equal fidelity: a line for every method, a point for every learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LEVELS), figsize=(11, 4.5), layout="constrained")
    for m, (colour, style) in _colours(list(dict.fromkeys(m for m, _ in groups))).items():
        for axis, level in zip(axes, LEVELS, strict=True):
            points = []
            for (of, lr), some in groups.items():
                found = [
                    per_subject(some, lambda x, v=level, n=n: (at_level(x, v) or {}).get(n)) for n in ("drift", "carried")
                ]
                if of == m and 2 * len(found[0]) > len({x["subject"] for x in some}):
                    points.append((lr, *(statistics.fmean(values.values()) for values in found)))
            axis.plot(
                [p[1] for p in points], [p[2] for p in points],
                color=colour, linestyle=style, marker="o", label=METHODS[m].label,
            )  # fmt: skip
            for lr, x, y in points:
                axis.annotate(f"{lr:g}", (x, y), xytext=(4, -9), textcoords="offset points", fontsize=7)
            axis.set(xlabel="drift of other captions", ylabel="carried over", title=f"at fidelity {level:g}")
            axis.grid(alpha=0.25)
    axes[0].legend(fontsize=7.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _colours(methods: list[str]) -> dict[str, tuple[str, str]]:
    """Method -> colour and line, for those of the methods that are plotted; a method always has the same."""
    ours = zip(OURS_PLOTTED, ("#6fa8dc", "#3d85c6", "#0b5394", "#45818e", "#351c75"), strict=True)
    theirs = zip(THEIRS_PLOTTED, ("#cc0000", "#e69138", "#f1a7c0", "#6aa84f", "#7f6000"), strict=True)
    looks = {m: (colour, "-") for m, colour in ours} | {m: (colour, "--") for m, colour in theirs}
    return {m: look for m, look in looks.items() if m in methods}


def _mean_at(lines: list[Line], method: str, measure: str, step: int) -> float:
    f = MEASURES[measure][1]
    if step == 0:
        return statistics.fmean(f(x["base"], x) for x in _of(lines, method))
    return statistics.fmean(f(row_at(x, step), x) for x in _of(lines, method))


def plot(lines: list[Line], methods: list[str], steps: tuple[int, ...], path: Path, title: str) -> None:
    """Drift and carrying over against fidelity, fidelity and drift over steps; means over subjects."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    for m, (colour, style) in _colours(methods).items():
        every = {k: [_mean_at(lines, m, k, s) for s in (0, *steps)] for k in ("fidelity", "drift", "carried")}
        look = {
            "color": colour,
            "linestyle": style,
            "marker": "o",
            "markersize": 3.5,
            "label": METHODS[m].label,
        }
        axes[0, 0].plot(every["fidelity"], every["drift"], **look)
        axes[0, 1].plot(every["fidelity"], every["carried"], **look)
        axes[1, 0].plot(steps, every["fidelity"][1:], **look)
        axes[1, 1].plot(steps, every["drift"][1:], **look)
    names = (
        ("fidelity", "drift of other captions"),
        ("fidelity", "carried over to backgrounds and places"),
        ("steps", "fidelity"),
        ("steps", "drift of other captions"),
    )
    for axis, (x, y) in zip(axes.flat, names, strict=True):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.25)
        if x == "steps":
            axis.set_xscale("log")
            few = [s for s in steps if s not in (15, 20, 35, 75)]
            axis.set_xticks(few, [str(s) for s in few])
            axis.minorticks_off()
    axes[0, 0].legend(fontsize=7.5)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


# The columns of a run's sheet that are shown: subject, class word, other captions, backgrounds, places, both.
SHOWN = (0, 1, 6, 7, 10, 12, 14, 15, 18, 20, 22, 23, 24, 25, 26, 28, 30, 31)


def contact_sheet(lines: list[Line], sheets: Path, path: Path, step: int) -> str | None:
    """Pictures of one subject after `step` steps, a row for each method. The subject; None without sheets."""
    from PIL import Image, ImageDraw

    found: dict[str, dict[str, Any]] = {}
    for x in lines:
        names = ("stage", "subject", "seed", "method", "lr", "pictures")
        file = sheets / sheet_name(*(x[n] for n in names))
        if file.is_file() and row_at(x, step) and x["seed"] == 0:
            row = 1 + [r["step"] for r in x["rows"]].index(step)
            found.setdefault(x["subject"], {})[METHODS[x["method"]].label] = (file, row)
    if not found:
        return None
    subject, unsorted = max(found.items(), key=lambda item: len(item[1]))
    rows = {m.label: unsorted[m.label] for m in METHODS.values() if m.label in unsorted}
    frozen = {"the model before": (next(iter(rows.values()))[0], 0)}
    whole = Image.new("RGB", (190 + 66 * len(SHOWN), 66 * (1 + len(rows))), "white")
    for y, (label, (file, row)) in enumerate({**frozen, **rows}.items()):
        ImageDraw.Draw(whole).text((4, 66 * y + 26), label, fill="black")
        with Image.open(file) as sheet:
            for x, column in enumerate(SHOWN):
                box = (64 * column, 64 * row, 64 * column + 64, 64 * row + 64)
                whole.paste(sheet.crop(box), (190 + 66 * x, 66 * y))
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path, quality=88)
    return subject


# ---------------------------------------------------------------- all of it


def report(lines: list[Line], folder: Path, sheets: Path) -> str:
    """The tables as Markdown; plots go to folder/images. Only `comparable` runs count.
    """
    every = [x for x in lines if x["stage"] == "main"]
    main = [x for x in every if x["batch"] == BATCH and x["pictures"] == PICTURES]
    if not main:
        return "### Learning rates\n\n" + grid_table(lines)
    main = comparable(main)
    every = [x for x in every if made_by(x) == made_by(main[0])]
    digest = main[0]["weights"]
    methods, *fewer = widest(main)
    even = balanced(main, methods)
    pairs = {(x["subject"], x["seed"]) for x in even}
    seeds = sorted({s for _, s in pairs})
    names = sorted({s for s, _ in pairs})
    alone = sum(x["method"] in methods for x in main) - len(even)
    out = [
        f"{len(even)} runs: {len(methods)} methods on the same {len(pairs)} pairs of subject and seed "
        + f"({len(names)} subjects: {', '.join(names)}; seeds {', '.join(map(str, seeds))}); {alone} runs "
        + f"without their counterparts are left out. Weights {digest}, batch {BATCH}, {PICTURES} pictures. "
        + "± is the standard deviation over subjects."
    ]
    for step in STEPS:
        if step >= 100:
            out.append(f"### After {step} steps\n\n" + step_table(even, methods, step))
    for level in LEVELS:
        out.append(f"### At equal fidelity {level:g}\n\n" + level_table(by_method(even, methods), level))
    plot(
        even,
        methods,
        STEPS,
        folder / "images" / "evaluation.png",
        f"{len(names)} subjects, {len(pairs)} runs a method",
    )
    for variants in fewer:
        shown = [m for m in METHODS if m in variants or m in BESIDE and m in methods]
        some = balanced(main, shown)
        if some:
            title = f"### Variants on {len({x['subject'] for x in some})} subjects"
            said = f"After {STEPS[-1]} steps, and at equal fidelity {LEVELS[0]:g}:"
            tables = [step_table(some, shown, STEPS[-1]), level_table(by_method(some, shown), LEVELS[0])]
            out.append("\n\n".join([title, said, *tables]))
    subject = contact_sheet(even, sheets, folder / "images" / "evaluation-pictures.jpg", STEPS[-1])
    if subject:
        out.append(f"The pictures above are of the {subject}, after {STEPS[-1]} steps, seed 0.")
    long = long_part([x for x in main if row_at(x, LONG_STEPS[-1])], folder / "images" / "evaluation-long.png")
    if long:
        out.append(long)
    more = pictures_table(every)
    if more:
        out.append("### More pictures\n\n" + more)
    out.append("### Random planes, same angles\n\n" + control_table(main))
    out.append("### Geometry and time\n\n" + geometry_table(even, methods))
    groups = rate_groups([x for x in lines if made_by(x) == made_by(main[0]) and x["pictures"] == PICTURES])
    if groups:
        plot_rates(groups, folder / "images" / "evaluation-rates.png")
        some = next(iter(groups.values()))
        count, seeds = len({x["subject"] for x in some}), sorted({x["seed"] for x in some})
        title = f"### Every learning rate, {count} subjects, seeds {', '.join(map(str, seeds))}"
        out.append(f"{title}\n\n{rate_tables(groups)}")
    grid = [x for x in lines if x["stage"] == "grid" and made_by(x) == made_by(main[0])]
    if grid:
        out.append("### Learning rates\n\n" + grid_table(grid))
    return "\n\n".join(out)


def guide(lines: list[Line]) -> dict[str, str]:
    """Name of a table of docs/training.md -> the table, from the subjects that all of its rows have."""
    runs: dict[tuple[str, int], list[Line]] = {}
    for x in comparable(x for x in lines if x["stage"] == "guide"):
        runs.setdefault((x["method"], x["pictures"]), []).append(x)
    out = {}
    for name, (head, rows) in GUIDE_TABLES.items():
        rows = [(said, runs[variant, count]) for said, variant, count in rows if (variant, count) in runs]
        shared = set.intersection(*({x["subject"] for x in some} for _, some in rows)) if rows else set()
        if len(rows) < 2 or not shared:
            continue
        cells = [[said, *_guide_row([x for x in some if x["subject"] in shared])] for said, some in rows]
        columns = [f"fidelity / drift at {s}" for s in GUIDE_STEPS]
        more = [f"{what} at {GUIDE_STEPS[-1]}" for what in ("leak", "class drift", "carried over", "follows")]
        table = markdown([head, *columns, *more, "largest angle", "ms of a step"], cells)
        count = "Mean of" if len(shared) > 1 else "From"
        digest = rows[0][1][0]["weights"]
        out[name] = f"{table}\n\n({count} {', '.join(sorted(shared))}; weights {digest}.)"
    return out


def _guide_row(lines: list[Line]) -> list[str]:
    def mean(name: str, step: int) -> str:
        return f"{statistics.fmean(MEASURES[name][1](row_at(x, step), x) for x in lines):.2f}"

    last = GUIDE_STEPS[-1]
    angle = max(row_at(x, last)["angle_max"] for x in lines)
    seconds = statistics.median(x["train_cpu_seconds"] / last for x in lines)
    return [
        *(f"{mean('fidelity', s)} / {mean('drift', s)}" for s in GUIDE_STEPS),
        *(mean(name, last) for name in ("leak", "class_drift", "carried", "follow")),
        f"{angle:.1f}°" if angle < 1 else f"{angle:.0f}°",
        f"{1000 * seconds:.0f}",
    ]


def between(path: Path, text: str, begin: str, end: str, new: str) -> str:
    """`text` with `new` between two marks. Raises ValueError naming the file where they are missing."""
    if begin not in text or end not in text.split(begin)[1]:
        raise ValueError(f"{path}: the marks '{begin}' and '{end}' are missing")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end, 1)[1]}"


def put(path: Path, text: str) -> None:
    atomically(path, lambda part: Path(part).write_text(text, "utf-8"))
    print(f"written: {path}")


def write(lines: list[Line], folder: Path, sheets: Path) -> None:
    """Put the tables between the marks of folder/evaluation.md (made if not there) and folder/training.md (if
    there are runs of the guide), the plots beside them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.md"
    text = path.read_text("utf-8") if path.is_file() else f"{BEGIN}\n{END}\n"
    put(path, between(path, text, BEGIN, END, report(lines, folder, sheets)))
    path = folder / "training.md"
    tables = guide(lines)
    if tables and path.is_file():
        text = path.read_text("utf-8")
        for name, table in tables.items():
            text = between(path, text, GUIDE_BEGIN.format(name), GUIDE_END.format(name), table)
        put(path, text)
