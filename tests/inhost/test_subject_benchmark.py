"""The pieces of benchmarks/subject.py on a model with random weights."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from embedded.autoencoder import decoder, encoder
from embedded.captions import COLOURS, PLACES, caption, concepts
from embedded.make.transformer import Network, host_class
from embedded.pictures import cutout, subjects, view
from oft_core.training import OFTConfig

for package in ("peft", "lycoris", "matplotlib"):
    pytest.importorskip(package)
before = list(sys.path)
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import subject
import subject_methods
import subject_metrics as metrics
import subject_report
import subject_selectivity as selectivity
import subject_task

# The benchmark looks for its imports in the repository's folder; with that on the path our `nodes` would hide ComfyUI's.
sys.path[:] = before


def world() -> subject_task.World:
    torch.manual_seed(0)
    core = Network(host_class()).core
    for p in core.parameters():
        torch.nn.init.normal_(p, std=0.05)
    parts = {"taesd_encoder": encoder(), "taesd_decoder": decoder()}
    autoencoder = {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
    return subject_task.World(core.state_dict(), autoencoder)


OWL = next(s for s in subjects() if s.name == "owl")
RATE = 1e-2


@pytest.fixture(scope="module", autouse=True)
def made():
    """WORLD and TASK, while ComfyUI's attention in this process is the tiny model's, which takes a bias."""
    global WORLD, TASK
    host = host_class()
    before = host.optimized_attention
    WORLD = world()
    TASK = subject_task.Task.of(WORLD, OWL, seed=3)
    yield
    host.optimized_attention = before


def space() -> metrics.Known:
    names = [c.name for c in concepts()]
    torch.manual_seed(0)
    encoder = metrics.Encoder().eval().requires_grad_(False)
    templates = torch.nn.functional.normalize(torch.randn(len(names), metrics.EMBEDDING), dim=1)
    templates[names.index("owl")] = encoder(metrics.as_tensor([view(cutout(OWL))]))[0]
    return metrics.Known(encoder, names, templates)


def test_colours_and_places_are_read_from_known_pictures() -> None:
    wanted, pictures = [], []
    for i, s in enumerate(subjects()):
        colour = [None, *COLOURS][i % (len(COLOURS) + 1)]
        for place in (None, *PLACES):
            pictures.append(view(cutout(s), colour=colour, place=place, flip=bool(i % 2)))
            wanted.append((colour or "white", place or "whole"))
    pictures = metrics.as_tensor(pictures)
    found = list(zip(metrics.backgrounds(pictures), metrics.places(pictures), strict=True))
    wrong = [(a, b) for a, b in zip(found, wanted, strict=True) if a != b]
    # A few things are as wide as the picture or touch two corners.
    assert len(wrong) <= 0.04 * len(wanted), wrong
    assert metrics.places(torch.ones(1, 3, 64, 64)) == ["none"]


def test_the_own_views_are_nearest_and_mixed_up_labels_are_not() -> None:
    known = space()
    own = known.embed(metrics.as_tensor([view(cutout(OWL))]))
    assert known.nearest(own) == ["owl"]
    assert known.nearest(-own) != ["owl"]
    black, white = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    assert metrics.rmse(black, white).item() == 1
    assert abs(metrics.spread(torch.cat([black, white, white])) - 2 / 3) < 1e-6


def test_the_encoder_learns_and_is_the_same_again() -> None:
    pictures = torch.stack([torch.full((64, 64, 3), v) for v in (10, 120, 240)]).byte().numpy()
    labels = torch.tensor([0, 1, 2]).numpy()
    first, again = (metrics.train_encoder(pictures, labels, steps=6, batch=12) for _ in range(2))
    x = metrics.as_tensor(pictures)
    assert torch.equal(first(x), again(x))
    apart = first(x) @ first(x).T
    torch.manual_seed(0)
    untrained = metrics.Encoder()(x)
    assert apart[0, 2] < (untrained @ untrained.T)[0, 2]


def test_a_caption_says_what_is_asked_for() -> None:
    for colour in (None, *COLOURS):
        for place in (None, *PLACES):
            text = caption("zwx sea animal", colour, place)
            assert subject_task.asked(text) == ("zwx sea animal", colour or "white", place or "whole"), text
    texts = subject_task.task_texts(OWL)
    assert {k: len(v) for k, v in texts.items()} == {"subject": 6, "class": 4, "other": 12, "follow": 12}
    assert not any("zwx" in t or "owl" in t.split() for t in texts["other"])


def test_more_pictures_are_other_views_than_the_held_out_ones() -> None:
    kinds = subject_task.training_views(20)
    assert kinds[:5] == metrics.TRAIN_VIEWS and len(set(kinds)) == 20
    assert not set(kinds) & set(metrics.HELD_VIEWS)
    records = subject_task.Task.of(WORLD, OWL, 0, pictures=7).records
    assert len(records) == 7
    # What differs between the views and can be said is said.
    assert [r.caption for r in records] == ["mirrored zwx bird" if k[3] else "zwx bird" for k in kinds[:7]]


def test_every_method_sees_the_same_data_and_learns() -> None:
    seen: dict[str, list[Tensor]] = {}
    original = WORLD.velocity
    before = WORLD.effective()
    for name, method in subject_methods.METHODS.items():
        calls: list[Tensor] = []

        def velocity(x: Tensor, sigma: Tensor, texts: list[str], calls: list[Tensor] = calls) -> Tensor:
            if "zwx" in texts[0]:  # class prompts of prior preservation come in between
                calls.append(torch.cat([x.flatten(), sigma]))
            return original(x, sigma, texts)

        WORLD.velocity = velocity
        try:
            learner = method.make(WORLD, TASK, RATE)
            learner.advance(2)
            learner.advance(3)
        finally:
            WORLD.velocity = original
        seen[name] = calls
        changed = learner.weights()
        assert set(changed) <= set(WORLD.layers)
        moved = {n for n in changed if (changed[n] - before[n]).norm() > 1e-4 * before[n].norm()}
        own = {n for n in WORLD.layers if "context_block" in n or not name.endswith("-text")}
        assert moved == own and len(own) in (5, 11), (name, moved)
        after = WORLD.effective()
        assert all(torch.equal(after[n], before[n]) for n in before), f"{name} left the model changed"
    for name, calls in seen.items():
        assert len(calls) == 3, (name, len(calls))
        assert all(torch.equal(a, b) for a, b in zip(calls, seen["oft32"], strict=True)), name
    assert not torch.equal(seen["oft32"][0], seen["oft32"][1])


def test_every_setting_of_the_guide_is_another_one_and_learns() -> None:
    assert {v for _, rows in subject_methods.GUIDE_TABLES.values() for _, v, _ in rows} == set(subject_methods.GUIDE)
    seen: dict[str, str] = {}
    layers: dict[str, int] = {}
    for name, method in subject_methods.GUIDE.items():
        (rate,) = method.grid
        learner = method.make(WORLD, TASK, rate)
        settings = json.dumps(learner.trainer.fingerprint(), sort_keys=True, default=str)
        assert settings not in seen, (name, seen[settings])
        seen[settings] = name
        learner.advance(2)
        before, after = WORLD.effective(learner.layers), learner.weights()
        assert set(after) == set(learner.layers)
        layers[name] = len(after)
        moved = [n for n in after if not torch.equal(after[n], before[n])]
        assert len(moved) == len(after), (name, moved)
    assert layers["guide-fast"] < layers["guide"] == len(WORLD.layers) < layers["guide-style"]


def test_dropped_captions_are_empty() -> None:
    texts: list[str] = []
    original = WORLD.velocity
    WORLD.velocity = lambda x, sigma, some: (texts.extend(some), original(x, sigma, some))[1]
    try:
        subject_methods.Ours(WORLD, TASK, RATE, OFTConfig(), caption_dropout=0.5).advance(12)
    finally:
        WORLD.velocity = original
    assert set(texts) == {"", "zwx bird", "mirrored zwx bird"} and len(texts) == 12


def test_ours_and_others_match_the_same_class_prompts() -> None:
    prompts = subject_task.class_prompts(OWL, composed=True)
    assert prompts[0] == "bird" and len(prompts) == len(set(prompts)) == 1 + 2 * len(COLOURS) + len(PLACES)
    seen = []
    original = WORLD.velocity
    for make in (subject_methods._ours("match", composed=True), subject_methods._lora(4, match=True, composed=True)):
        texts: list[str] = []
        WORLD.velocity = lambda x, sigma, some, texts=texts: (texts.extend(some), original(x, sigma, some))[1]
        try:
            make(WORLD, TASK, RATE).advance(4)
        finally:
            WORLD.velocity = original
        seen.append([t for t in texts if "zwx" not in t])
    # Each is asked twice: frozen and adapted, whichever comes first.
    assert len(seen[0]) == 8 and sorted(seen[0]) == sorted(seen[1]) and set(seen[0]) <= set(prompts)


def test_rotations_keep_the_geometry_and_random_planes_the_angles() -> None:
    learner = subject_methods.METHODS["oft32"].make(WORLD, TASK, RATE)
    learner.advance(3)
    facts = learner.facts()
    assert facts["orthogonality"] < 1e-6
    assert 0.5 < facts["angle_max"] < 60
    learnt, turned = learner.weights(), learner.random_weights()
    judge = subject.Judge(WORLD, space(), TASK)
    for weights in (learnt, turned):
        assert judge.look(weights)[0]["gram"] < 1e-5
    lora = subject_methods.METHODS["lora4"].make(WORLD, TASK, RATE)
    lora.advance(3)
    assert judge.look(lora.weights())[0]["gram"] > 1e-4
    name = WORLD.layers[0]
    own = WORLD.effective()[name]
    far = [(w[name] - own).norm().item() for w in (learnt, turned)]
    # The same angles move the weight about as far, into another direction.
    assert 0.5 < far[0] / far[1] < 2
    assert (learnt[name] - turned[name]).norm() > 0.5 * far[0]


def test_the_frozen_model_has_no_drift_and_changed_weights_have() -> None:
    judge = subject.Judge(WORLD, space(), TASK)
    same, pictures = judge.look({n: w.clone() for n, w in judge.own_weights.items()})
    assert same["drift"] == 0 and same["gram"] == 0
    assert torch.equal(pictures, judge.frozen)
    line = {"base": judge.base, "ceilings": judge.ceilings}
    assert subject.normalised(same["similarity"], line) == 0
    for name, best in judge.ceilings.items():
        assert subject.normalised(best, line, name) == 1
    pictures = metrics.as_tensor(judge._composed())
    wanted = [subject_task.asked(t) for t in judge.texts[judge.part["follow"]]]
    assert metrics.backgrounds(pictures) == [colour for _, colour, _ in wanted]
    assert metrics.places(pictures) == [place for *_, place in wanted]
    other, _ = judge.look({n: 1.5 * w for n, w in judge.own_weights.items()})
    assert other["drift"] > 0.01
    assert other["held_loss"] != same["held_loss"]


def fake(job: subject.Job) -> dict:
    # A learner that is perfect from step 100 on, and drifts with its learning rate.
    good = {"1e-2": 0.2}.get(f"{job.lr:g}", 0.1)
    names = (
        "recognised",
        "leak",
        "other_right",
        "colour",
        "place",
        "follow",
        "follow_recognised",
        "carried",
        "class_drift",
        "diversity",
        "held_loss",
    )
    rest = dict.fromkeys(names, 0.5)
    rows = [
        {"step": s, "similarity": 0.8 if s >= 100 else 0.3, "drift": job.lr * 10 + good, "gram": 0.0, **rest}
        for s in job.steps
    ]
    base = {"similarity": 0.2, "drift": 0.0, **rest}
    extra = {"orthogonality": 1e-7, "angle_max": 9.0, "angle_rms": 3.0}
    if job.method == subject_methods.CONTROL or job.stage == "guide":
        rows = [{**r, **extra} for r in rows]
    return {
        "stage": job.stage, "weights": "w", "encoder": "e", "method": job.method, "lr": job.lr, "subject": job.subject,
        "seed": job.seed, "batch": job.batch, "pictures": job.pictures,
        "ceilings": {"similarity": 0.8, "carried": 0.7}, "base": base, "rows": rows,
        "control": rows if job.method == subject_methods.CONTROL else [], "train_cpu_seconds": 1.0,
    }  # fmt: skip


def test_a_stopped_run_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    methods = ("oft32", "lora4", "lora16")
    subject.work_through(subject.grid_jobs(methods, 2, 1), {}, 5, fake, path)
    rates = {m: 1e-3 for m in methods}
    jobs = subject.main_jobs(methods, rates, 4, (0, 1), 1)
    assert subject.work_through(jobs, {}, 0, fake, path) == len(jobs)
    ran: list[subject.Job] = []

    def interrupted(job: subject.Job) -> dict:
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(job)
        return fake(job)

    try:
        subject.work_through(jobs, {}, 5, interrupted, path)
    except KeyboardInterrupt:
        with path.open("a", encoding="utf-8") as file:
            file.write('{"stage": "main", "meth\n')
    done = subject.finished(x for x in subject.read(path) if x["stage"] == "main")
    assert done == {job.key: job.steps[-1] for job in jobs[:5]}
    # A run that is asked for with more steps is run again.
    longer = [replace(jobs[3], steps=subject.LONG_STEPS)]
    assert subject.work_through(longer, done, 0, fake, path) == 1
    assert subject.work_through([jobs[3]], done, 0, fake, path) == 0
    assert subject.work_through(jobs, done, 5, fake, path) == 0
    lines = [x for x in subject.read(path) if x["stage"] == "main"]
    assert len(lines) == len({subject.key_of(x) for x in lines}) == len(jobs) == 4 * 2 * 3
    # What is done so far is balanced: all methods of a subject before the next one.
    assert [j.subject for j in jobs[:6]] == [jobs[0].subject] * 3 + [jobs[3].subject] * 3
    assert not {j.subject for j in jobs} & set(subject.GRID_SUBJECTS)
    assert [len(j.steps) for j in jobs].count(len(subject.LONG_STEPS)) == 2 * 3
    # More long runs keep those that there are.
    few, all_of_them = (
        {j.subject for j in subject.main_jobs(("oft32",), rates, 4, (0,), n) if j.steps == subject.LONG_STEPS} for n in (1, 4)
    )
    assert few == {jobs[6].subject} and all_of_them == {j.subject for j in jobs}


def test_a_longer_run_takes_over_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_draw = subject_task.World.draw
    # Fewer steps, for speed: pictures are only compared with each other.
    monkeypatch.setattr(subject_task.World, "draw", lambda *args: whole_draw(*args, steps=2))
    short = subject.Job("main", "oft32", RATE, "owl", 3, (1, 2))
    long, known, judges = replace(short, steps=(1, 2, 3)), space(), {}
    before = subject.run(short, WORLD, known, judges)
    looks, look = [], subject.Judge.look
    subject.Judge.look = lambda *a: looks.append(1) or look(*a)
    try:
        taken = subject.run(long, WORLD, known, judges, None, before)
        assert len(looks) == 3, "after 2 and 3 steps, and random planes after 3"
        # Of another machine, whose numbers differ in the last digits: nothing is taken over.
        other = before | {"rows": [r | {"drift": r["drift"] + 1e-6, "leak": 9.0} for r in before["rows"]]}
        anew = subject.run(long, WORLD, known, judges, None, other)
    finally:
        subject.Judge.look = look
    timed = "train_cpu_seconds"
    assert taken | {timed: 0} == anew | {timed: 0} and all(r["leak"] < 9 for r in anew["rows"])
    # Both lines are in the file: the longer one counts.
    path = tmp_path / "longer.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (taken, before)))
    assert subject.read(path) == [taken]


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    methods = ("oft32", "lora4", "lora16")
    subject.work_through(subject.grid_jobs(methods, 2, 1), {}, 5, fake, path)
    jobs = subject.main_jobs(methods, dict.fromkeys(methods, 1e-3), 3, (0,), 1)
    subject.work_through(jobs[:-1], {}, 5, fake, path)
    folder = tmp_path / "docs"
    folder.mkdir(exist_ok=True)
    (folder / "evaluation.md").write_text(
        f"before\n{subject_report.BEGIN}\nold\n{subject_report.END}\nafter\n"
    )
    for _ in range(2):
        subject_report.write(subject.read(path), folder, tmp_path / "no sheets")
    text = (folder / "evaluation.md").read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    # The last run is missing, so its subject is left out for all methods.
    assert "6 runs: 3 methods on the same 2 pairs" in text and "2 runs without their counterparts" in text
    assert "2 of 2" in text
    assert (folder / "images" / "evaluation.png").stat().st_size > 5000


def test_every_rate_is_compared_on_the_same_subjects_and_seeds(tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    methods, reference = ("subject", "lora16-match"), subject_report.REFERENCE
    rates = {"subject": 1e-2, "lora16-match": 3e-3, "default": 1e-3, reference: 3e-3}
    chosen = subject.main_jobs(tuple(rates), rates, 3, (0, 1), 3)
    subject.work_through(chosen, {}, 5, fake, path)
    jobs = subject.rate_jobs(methods, 3, (0, 1), 1)
    done = subject.finished(subject.rate_lines(subject.read(path)))
    # The chosen rates are not run again, nor the preset's at which Train OFT comes.
    left = [j for j in jobs if done.get(j.key, 0) < j.steps[-1]]
    assert len(jobs) == 6 * 6 and {(j.method, j.lr) for j in left} == {
        ("subject", 3e-3), ("lora16-match", 3e-4), ("lora16-match", 1e-3)
    } and len(left) == 6 * 3  # fmt: skip
    # The last run is missing, so its subject and seed do not count for any rate.
    subject.work_through(left[:-1], {}, 5, fake, path)
    groups = subject_report.rate_groups(subject.read(path))
    assert list(groups) == [*((j.method, j.lr) for j in jobs[:6]), (reference, 3e-3)], list(groups)
    pairs = {frozenset((x["subject"], x["seed"]) for x in some) for some in groups.values()}
    assert len(pairs) == 1 and len(next(iter(pairs))) == 5 and all(len(some) == 5 for some in groups.values())
    assert all(x["rows"][-1]["step"] == subject.RATE_STEPS[-1] for some in groups.values() for x in some)
    tables = subject_report.rate_tables(groups).split("\n\n")
    assert [len(table.splitlines()) for table in tables] == [1, 2 + 7] * 3
    # What the others are compared with stays at its own rate, also where it has several.
    subject.work_through(subject.rate_jobs((reference,), 3, (0, 1), 1), done, 5, fake, tmp_path / "reference rates.jsonl")
    several = subject.read(path) + subject.read(tmp_path / "reference rates.jsonl")
    rows = subject_report.rate_tables(subject_report.rate_groups(several)).split("\n\n")[1].splitlines()
    mine = {row.split(" | ")[1]: row.endswith("| - | - | - |") for row in rows if row.startswith("| LoRA rank 16 (PEFT)")}
    assert mine == {"0.0003": False, "0.001": False, "0.003": True}, mine
    folder = tmp_path / "rates docs"
    folder.mkdir(exist_ok=True)
    subject_report.write(subject.read(path), folder, tmp_path / "no sheets")
    assert "### Every learning rate, 3 subjects, seeds 0, 1" in (folder / "evaluation.md").read_text("utf-8")
    assert (folder / "images" / "evaluation-rates.png").stat().st_size > 5000


def test_the_guide_is_written_from_its_runs(tmp_path: Path) -> None:
    path = tmp_path / "guide.jsonl"
    jobs = subject.guide_jobs(2)
    assert not {j.subject for j in jobs} & {s.name for s in subject.reported_subjects()[: subject.SUBJECTS]}
    # The last subject has not got to 20 pictures yet; runs with other weights do not count.
    subject.work_through(jobs[:-1], {}, 5, fake, path)
    old = {**fake(jobs[-1]), "weights": "older"}
    lines = [*subject.read(path), old]
    main = [fake(j) for j in subject.main_jobs(("oft32", "lora16"), dict.fromkeys(("oft32", "lora16"), 1e-3), 1, (0,), 0)]
    folder = tmp_path / "guide docs"
    folder.mkdir(exist_ok=True)
    text = "head\n"
    for name in subject_methods.GUIDE_TABLES:
        begin, end = (m.format(name) for m in (subject_report.GUIDE_BEGIN, subject_report.GUIDE_END))
        text += f"{name}:\n{begin}\nold\n{end}\n"
    (folder / "training.md").write_text(text + "tail\n", "utf-8")
    for _ in range(2):
        subject_report.write([*main, *lines], folder, tmp_path / "no sheets")
    found = (folder / "training.md").read_text("utf-8")
    assert found.startswith("head\npictures:\n") and found.endswith("tail\n") and "old\n" not in found
    first, second = jobs[0].subject, jobs[-1].subject
    parts = found.split("<!-- guide: ")[1:]
    assert f"(From {first}; weights w.)" in parts[0] and f"| {jobs[-1].pictures} |" in parts[0]
    both = ", ".join(sorted((first, second)))
    assert all(f"(Mean of {both}; weights w.)" in part for part in parts[1:]), found
    # Fidelity 1 and drift 0.11 from step 100 on, with the default learning rate.
    assert "| 32 (default) | 1.00 / 0.11 | 1.00 / 0.11 |" in found
    assert "| 0.003 | 1.00 / 0.13 |" in found
    (folder / "training.md").write_text("no marks", "utf-8")
    try:
        subject_report.write([*main, *lines], folder, tmp_path / "no sheets")
    except ValueError as error:
        assert "training.md" in str(error) and "pictures" in str(error)
    else:
        raise AssertionError("no marks, and no error")


def test_methods_with_fewer_runs_do_not_shrink_the_others(tmp_path: Path) -> None:
    methods = ("subject", "lora16")
    jobs = subject.main_jobs(methods, dict.fromkeys(methods, 1e-3), 6, (0,), 0)
    jobs += subject.main_jobs(("coft",), {"coft": 1e-3}, 2, (0,), 0)
    jobs += subject.main_jobs(("lora4",), {"lora4": 1e-3}, 4, (0,), 0)
    text = subject_report.report([fake(j) for j in jobs], tmp_path / "fewer", tmp_path / "no sheets")
    assert "12 runs: 2 methods on the same 6 pairs" in text and "; 0 runs without" in text
    first, second = (part.split("###")[0] for part in text.split("### Variants")[1:])
    for part, count, method, other in ((first, 4, "lora4", "coft"), (second, 2, "coft", "lora4")):
        assert part.startswith(f" on {count} subjects") and subject_methods.METHODS[other].label not in part
        assert subject_methods.METHODS[method].label in part and part.count(f"| {count} |") == 3
        assert part.count(f"{count} of {count}") == 3


def test_every_method_fits_into_one_report(tmp_path: Path) -> None:
    jobs = subject.main_jobs(subject_methods.METHODS, dict.fromkeys(subject_methods.METHODS, 1e-3), 2, (0,), 0)
    text = subject_report.report([fake(j) for j in jobs], tmp_path / "all", tmp_path / "no sheets")
    table = text.split("### After 400 steps")[1].split("###")[0]
    assert all(f"| {m.label} |" in table for m in subject_methods.METHODS.values()) and "Variants" not in text
    looks = subject_report._colours(list(subject_methods.METHODS))
    assert len(set(looks.values())) == len(looks) == 10
    assert subject_report._colours(["core", "coft"]) == {"core": looks["core"]}


def test_long_runs_of_some_methods_do_not_shrink_the_others(tmp_path: Path) -> None:
    methods = ("subject", "lora16", "coft")
    jobs = subject.main_jobs(methods, dict.fromkeys(methods, 1e-3), 6, (0,), 2)
    jobs += subject.main_jobs(methods[:2], dict.fromkeys(methods, 1e-3), 3, (1, 2), 1)
    assert [j.seed for j in jobs if j.steps == subject.LONG_STEPS] == [0] * 6 + [1] * 2 + [2] * 2
    text = subject_report.report([fake(j) for j in jobs], tmp_path / "long", tmp_path / "no sheets")
    text = text.split("### 2,000 steps")[1].split("###")[0]
    both, some = text.split("4 runs a method.")
    assert "2 subjects, seed 0: 2 runs a method." in both and both.count("| 2 |") == 3
    assert "2 subjects, seeds 0, 1, 2: " in both and some.count("| 2 |") == 2
    assert subject_methods.METHODS["coft"].label in both and subject_methods.METHODS["coft"].label not in some


def test_a_change_reaches_whom_it_is_for() -> None:
    before = torch.eye(4)
    own, other = torch.eye(4)[:1].repeat(3, 1), torch.eye(4)[1:2]
    after = before.clone()
    after[:, 0] *= 1.5
    assert selectivity.reach(before, before, own) == 0
    assert abs(selectivity.reach(before, after, own) - 0.5) < 1e-6 and selectivity.reach(before, after, other) == 0
    given = selectivity.inputs(WORLD, ["owl", "castle"])
    assert set(given) == set(WORLD.layers)
    # Three noise levels: 16 patches of the picture each, and the word between its two marks, without what is filled up.
    assert {x.shape[0] for n, x in given.items() if "x_block" in n} == {3 * 2 * 16}
    assert {x.shape[0] for n, x in given.items() if "context_block" in n} == {3 * 2 * 3}
    weights = WORLD.effective()
    louder = {n: w * (1.5 if "context" in n else 2.0) for n, w in weights.items()}
    for stream, amount in (("context_block", 0.5), ("x_block", 1.0)):
        found = selectivity.reaches(weights, louder, {"own": given}, stream)
        assert abs(found["own"] - amount) < 1e-4, found
    steps, selectivity.STEPS = selectivity.STEPS, 2
    try:
        rows = selectivity.measured(WORLD, 1, dict.fromkeys(selectivity.METHODS, RATE))
    finally:
        selectivity.STEPS = steps
    assert len(rows) == len(selectivity.METHODS) + len(selectivity.BLOCKS)
    assert all(float(row[2]) > 0 for row in rows) and len({len(row) for row in rows}) == 1


def test_levels_are_found_between_checkpoints_and_rates_by_balance() -> None:
    line = fake(subject.Job("main", "oft32", 1e-3, "crab", 0, (50, 100)))
    # Fidelity 1/6 at step 50 and 1 at step 100: 0.5 is reached at 70.
    at = subject_report.at_level(line, 0.5)
    assert abs(at["step"] - 70) < 1e-6 and abs(at["fidelity"] - 0.5) < 1e-9
    assert subject_report.at_level(replace_rows(line, 0.25), 0.5) is None
    grid = [fake(job) for job in subject.grid_jobs(subject_methods.METHODS, 2, 1)]
    chosen = subject.chosen_rates(grid)
    assert chosen["oft32"] == 1e-3 and chosen["lora16-decay"] == chosen["lora16-match"] == 3e-4
    assert subject.chosen_rates([], ["default"]) == {"default": 1e-3}
    # A better run at another rate does not count while the rest of that subject's grid is missing.
    other = fake(subject.Job("grid", "oft32", 3e-3, "guitar", 0, subject.GRID_STEPS))
    perfect = [{**r, "drift": 0.0} for r in other["rows"]]
    assert subject.chosen_rates([*grid, {**other, "rows": perfect}])["oft32"] == 1e-3
    third = [fake(replace(job, subject="guitar")) for job in subject.grid_jobs(["oft32"], 1, 1)]
    turned = [{**x, "rows": perfect} if x["lr"] == 3e-3 else x for x in third]
    assert subject.chosen_rates(turned + [x for x in grid if x["method"] != "oft32"])["oft32"] == 3e-3
    try:
        subject.chosen_rates(grid[1:3])
    except ValueError as error:
        assert "oft32" in str(error)
    else:
        raise AssertionError("no grid, and no error")


def replace_rows(line: dict, similarity: float) -> dict:
    return {**line, "rows": [{**r, "similarity": similarity} for r in line["rows"]]}
