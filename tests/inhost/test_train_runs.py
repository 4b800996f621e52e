"""Training: stop, resume, errors, what is kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import families
import folder_paths
import pytest
import torch
from comfyui_oft.nodes import dataset, save, train
from comfyui_oft.nodes.binding import apply as host
from comfyui_oft.nodes.binding import files, folders
from comfyui_oft.nodes.training import host as train_host
from comfyui_oft.nodes.training import identity as train_identity
from comfyui_oft.nodes.training import mode as train_mode
from comfyui_oft.nodes.training import run as train_run
from comfyui_oft.oft_core import AdapterError, Strength
from comfyui_oft.oft_core.training import (
    OFTConfig,
    StateError,
    Trainer,
    TrainingError,
    filenames,
)
from comfyui_oft.oft_core.training import run as core_run
from comfyui_oft.oft_core.training import store as train_store
from comfyui_oft.oft_core.training.plan import UNET
from learning import (
    a_run,
    a_set,
    fresh_user,
    go,
    learnt,
    parts,
    pictures,
    raises,
    replaced,
    same,
    state,
    untouched,
)
from safetensors.torch import load_file


def stop_before(step):
    """In place of a trainer's step: the interrupt button, pressed as the step after `step` begins."""
    one_step = Trainer._one_step

    def instead(self, started):
        if self.step == step:
            raise train_mode.Stopped
        one_step(self, started)

    return instead


@contextlib.contextmanager
def stopped_at(step):
    """The interrupt button, pressed while step `step` ends."""

    def hook(value, total, preview, node_id=None):
        if value == step:
            raise train_mode.Stopped

    with replaced(comfy.utils, "PROGRESS_BAR_HOOK", hook):
        yield


def test_stop_keeps_the_work_and_resume_is_exact():
    options = {"steps": 8, "config": {"ema": 0.9, "schedule": "cosine", "module_dropout": 0.2}}
    fresh_user()
    whole = go(a_run(**options))
    fresh_user()
    model = parts("sd15")[0]
    before = state(model)
    with stopped_at(3):
        run = a_run(**options)
        try:
            go(run)
            raise AssertionError("not stopped")
        except train_mode.Stopped:
            pass
    same(before, state(model))
    untouched(model.model)
    assert run.trainer.step == 3 and run.path.is_file(), "the work of a stopped run is lost"
    kept = run.path
    assert set(folders.read(files.listed(kept)).entries), "the kept file cannot be read"
    rest = a_run(**options)
    outcome = go(rest)
    assert rest.resumed == 3 and rest.path == kept
    assert outcome.losses == whole.losses, f"{outcome.losses} {whole.losses}"
    same(learnt(outcome), learnt(whole))
    assert torch.equal(outcome.samples[-1], whole.samples[-1])


def test_stop_in_the_middle_of_a_step():
    fresh_user()
    whole = go(a_run(steps=5))
    fresh_user()
    attention = comfy.ldm.modules.attention
    count = 0

    def sometimes(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 35:
            raise train_mode.Stopped
        return before(*args, **kwargs)

    run = a_run(steps=5)
    with replaced(attention, "attention_pytorch", sometimes) as before:
        try:
            go(run)
            raise AssertionError("not stopped")
        except train_mode.Stopped:
            pass
    assert 0 < run.trainer.step < 5
    untouched(run.host.base)
    rest = a_run(steps=5)
    outcome = go(rest)
    assert rest.resumed == run.trainer.step and outcome.losses == whole.losses
    same(learnt(outcome), learnt(whole))


def test_more_steps_go_on():
    fresh_user()
    whole = go(a_run(steps=7))
    fresh_user()
    go(a_run(steps=4))
    more = a_run(steps=7)
    outcome = go(more)
    assert more.resumed == 4 and outcome.losses == whole.losses
    same(learnt(outcome), learnt(whole))
    anew = a_run(steps=9, resume=False)
    go(anew)
    assert anew.resumed == 0
    fewer = a_run(steps=5)
    assert go(fewer).losses == whole.losses[:5] and fewer.trainer.step == 5
    assert go(a_run(steps=11)).losses[:7] == whole.losses, "a shorter run has spoilt the longer one's state"


def test_a_runs_file_is_known_again():
    """A number is given again once its file is gone: the file of another run is neither put out nor written over."""
    fresh_user()
    wanted = {"steps": 2, "name": "training/own"}
    first = go(a_run(**wanted))
    path, values = Path(first.adapter.path), learnt(first)

    def taken_by(**options):
        """Another run gets the number of the file, which is deleted."""
        path.unlink()
        assert Path(go(a_run(**{**wanted, **options})).adapter.path) == path
        return path.read_bytes()

    for options in ({"seed": 8}, {"steps": 3}):
        theirs = taken_by(**options)
        again = go(a_run(**wanted))
        assert "nothing was trained again" in again.report and again.name in again.report
        same(learnt(again), values)
        assert Path(again.adapter.path) != path and path.read_bytes() == theirs
        assert go(a_run(**wanted)).name == again.name, "the new place is not remembered"
        path = Path(again.adapter.path)
    # Deleted, and the place is free.
    path.unlink()
    same(learnt(go(a_run(**wanted))), values)
    assert path.is_file()
    # What a user saved in its place, from this very adapter.
    with torch.inference_mode():
        kept = {"name": "training/copy", "dialect": save.AS_IS, "precision": "fp16", "folder": "oft"}
        copied = save.OFTSave.execute(adapter=again.adapter, **kept).args[0]
    os.replace(folders.find(copied), path)
    same(learnt(go(a_run(**wanted))), values)
    assert any(t.dtype == torch.float16 for t in load_file(path).values()), "the copy was written over"


def test_a_stopped_run_does_not_write_over_another_runs_file():
    fresh_user()
    wanted = {"steps": 3, "name": "training/begun"}
    with stopped_at(1), contextlib.suppress(train_mode.Stopped):
        begun = a_run(**wanted)
        go(begun)
    begun.path.unlink()
    other = go(a_run(seed=8, **wanted))
    assert Path(other.adapter.path) == begun.path
    theirs = begun.path.read_bytes()
    rest = a_run(**wanted)
    outcome = go(rest)
    assert rest.resumed == 1 and rest.path != begun.path and begun.path.read_bytes() == theirs
    assert Path(outcome.adapter.path) == rest.path
    # Begun anew where it was completed, and stopped: its result is the whole one again.
    with stopped_at(1), contextlib.suppress(train_mode.Stopped):
        anew = a_run(**wanted, resume=False, config={"sample_steps": 1})
        go(anew)
    assert anew.path == rest.path and filenames.header(rest.path)["ss_steps"] == "1"
    same(learnt(go(a_run(**wanted))), learnt(outcome))
    assert filenames.header(rest.path)["ss_steps"] == "3"


def test_out_of_memory_is_clear_and_keeps_the_state():
    fresh_user()
    model = parts("sd15")[0]
    before = state(model)
    run = a_run(steps=5)
    predict, count = run.host.predict, 0

    def hungry(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return predict(*args)

    run.host.predict = hungry
    raises(TrainingError, lambda: go(run), "out of memory", "resolution", "2 steps is kept")
    same(before, state(model))
    untouched(model.model)
    again = a_run(steps=5)
    go(again)
    assert again.resumed == 2
    # While the pictures are encoded, too.
    fresh_user()
    run = a_run(steps=5)

    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with replaced(parts("sd15")[2], "encode", no_room):
        raises(TrainingError, lambda: go(run), "out of memory", "low_vram")


@contextlib.contextmanager
def room(size):
    """Within, files may grow to `size` bytes, then writes fail as on a full disk."""
    import resource
    import signal

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_costs_no_file_and_no_work():
    """Caches do without; a state that cannot be written ends the run with a clear error and, where it fits, the file."""
    if sys.platform == "win32":
        pytest.skip("no limit of a file's size")
    fresh_user()
    usual = a_run(steps=3, name="training/full_disk")
    whole = go(usual)
    (state_file,) = usual.folder.glob("state-*.safetensors")
    file_size, state_size = os.path.getsize(whole.adapter.path), state_file.stat().st_size
    assert file_size + 2000 < state_size, (file_size, state_size)
    learnt_then = learnt(whole)
    before = state(parts("sd15")[0])

    def rest(run):
        return [str(p) for place in (run.folder, run.store.folder, run.path.parent) for p in place.glob("**/.*")]

    fresh_user()
    run = a_run(steps=3, name="training/full_disk")
    with room((file_size + state_size) // 2):
        text = raises(StateError, lambda: go(run), "File too large", "disk space", "3 steps", "full_disk")
    assert not rest(run) and not list(run.folder.glob("state-*")), text
    same(learnt_then, load_file(run.path))
    same(before, state(parts("sd15")[0]))
    untouched(parts("sd15")[0].model)
    # Nothing fits: still an error of ours, nothing half anywhere; the caches did without.
    fresh_user()
    run = a_run(steps=3, name="training/full_disk")
    with room(300):
        raises(AdapterError, lambda: go(run), "File too large", ".safetensors")
    assert not rest(run) and not run.path.exists() and not list(run.store.folder.glob("*"))
    # With room again it is the run that it would have been, and keeps what it has once more.
    again = a_run(steps=3, name="training/full_disk")
    outcome = go(again)
    same(learnt_then, learnt(outcome))
    assert outcome.losses == whole.losses and list(again.store.folder.glob("*.safetensors"))
    # A run that goes on keeps its states, its file and the caches as they were.
    kept = {p: p.read_bytes() for p in (*again.folder.glob("state-*"), *again.store.folder.glob("*"), again.path)}
    more = a_run(steps=5, name="training/full_disk")
    with room(300):
        raises(AdapterError, lambda: go(more), "File too large")
    assert kept == {p: p.read_bytes() for p in kept} and not rest(more)
    last = go(a_run(steps=5, name="training/full_disk"))
    assert last.losses[:3] == whole.losses and len(last.losses) == 5


def test_base_is_as_before_after_an_error():
    fresh_user()
    model = parts("sd15")[0]
    with torch.inference_mode():
        plain = train_host.HostModel(*parts("sd15"))
        plan = a_run().plan.samples
        picture = plain.sample_latent("a cat", plan, (64, 64), 5)
    run = a_run(learning_rate=0.02)
    run.host.predict = lambda *_: 1 / 0
    with contextlib.suppress(ZeroDivisionError):
        go(run)
    untouched(model.model)
    go(a_run())
    with torch.inference_mode():
        again = train_host.HostModel(*parts("sd15")).sample_latent("a cat", plan, (64, 64), 5)
    assert torch.equal(picture, again), "the base model draws another picture than before"


def test_presets_decide_what_is_not_given():
    of = a_set(class_prompt="a photo of a cat")
    plan = a_run(of=of).plan
    assert (plan.oft.module_dropout, plan.settings.weight_decay, plan.settings.prior) == (0.2, 1.0, "match")
    style = a_run(of=of, preset="style").plan
    assert (style.oft.module_dropout, style.settings.weight_decay, style.settings.prior) == (0.0, 0.01, "none")
    # What the settings node shows before anything is typed in means: by preset.
    shown = {i.id: i.default for i in train.OFTTrainConfigNode.define_schema().inputs}
    assert shown["module_dropout"] == shown["weight_decay"] == -1
    left = a_run(of=of, config={k: shown[k] for k in ("module_dropout", "weight_decay", "caption_dropout", "prior")}).plan
    assert left == plan
    own = a_run(of=of, config={"module_dropout": 0.0, "weight_decay": 0.0}).plan
    assert (own.oft.module_dropout, own.settings.weight_decay) == (0.0, 0.0)


def test_text_attention_is_where_the_text_goes():
    """Exactly those attention layers that get as many tokens as the text has, and nothing but them, in every family."""
    def tokens_of(run, layers):
        """Layer -> tokens that it gets in one forward; and the text's tokens."""
        seen, length = {}, []

        def note(name):
            return lambda module, args: seen.update({name: args[0].shape[-2]})

        def context(module, args, named):
            length.append((named["context"] if named.get("context") is not None else args[2]).shape[1])

        net = run.host.net
        hooks = [net.get_submodule(name).register_forward_pre_hook(note(name)) for name in layers]
        hooks.append(net.register_forward_pre_hook(context, with_kwargs=True))
        record = next(iter(run.dataset.records))
        with train_mode.training_mode(), torch.no_grad():
            run.host.predict(run.objective.noised(run.host.load_batch([record]).latents, 0, 0, [0]), [record])
        for hook in hooks:
            hook.remove()
        assert set(seen) == layers, layers - set(seen)
        return seen, length[0]

    for family in ("sd15", "sd2", "sdxl", "sd3", "sd35", "flux"):
        fresh_user()
        run = a_run(family, config={"target_modules": "text-attention"}, steps=1)
        go(run)
        chosen = {c.name for c in run.bank.parts[UNET][1].layers}
        whole = {c.name for c in OFTConfig().select(run.host.net).layers}
        seen, length = tokens_of(run, whole)
        assert chosen == {n for n, tokens in seen.items() if tokens == length}, (family, chosen, seen, length)
        assert chosen and chosen < whole


def test_same_inputs_do_not_train_again():
    fresh_user()
    first = go(a_run(steps=4))
    trained = []
    run = Trainer.run
    with replaced(Trainer, "run", lambda self: trained.append(1) or run(self)):
        again = go(a_run(steps=4))
        assert not trained, "trained again"
        assert again.name == first.name and again.losses == first.losses
        assert torch.equal(again.samples, first.samples) and "again" in again.report
        Path(first.adapter.path).unlink()
        back = go(a_run(steps=4))
        assert not trained and Path(back.adapter.path).is_file(), "a deleted file does not come back"
        for changed in (
            {"of": a_set(trigger="sks")},
            {"of": a_set(pictures=[pictures(seed=1)])},
            {"learning_rate": 0.01},
            {"block_size": 4},
            {"seed": 4},
            {"config": {"caption_dropout": 0.5}},
            {"of_parts": (families.make_model("sd15", seed=1), *parts("sd15")[1:])},
            {"of_parts": (parts("sd15")[0], families.make_clip("sd15", seed=1), parts("sd15")[2])},
        ):
            count = len(trained)
            go(a_run(**{"steps": 4, **changed}))
            assert len(trained) == count + 1, f"not trained for {list(changed)}"
        with torch.inference_mode():
            patched = host.apply(first.adapter, parts("sd15")[0], None, Strength(1.0), Strength(1.0)).model
        keys = {a_run(of_parts=(m, *parts("sd15")[1:])).key for m in (parts("sd15")[0], patched)}
        assert len(keys) == 2, "a patched model counts as the unpatched one"
        with torch.inference_mode():
            twice = host.apply(first.adapter, parts("sd15")[0], None, Strength(1.0), Strength(1.0)).model
        assert a_run(of_parts=(twice, *parts("sd15")[1:])).key in keys


@contextlib.contextmanager
def counted(*places):
    """How often each of the functions (owner, name) is called."""
    counts = [0] * len(places)
    with contextlib.ExitStack() as stack:
        for i, (owner, name) in enumerate(places):
            function = getattr(owner, name)

            def call(*args, i=i, function=function, **options):
                counts[i] += 1
                return function(*args, **options)

            stack.enter_context(replaced(owner, name, call))
        yield counts


def test_latents_and_embeddings_are_kept_for_later_runs():
    """By content: other pictures, captions, VAEs or text encoders are encoded anew; the same ones never again."""
    fresh_user()
    model, clip, vae = parts("sd15")
    encoder = clip.cond_stage_model
    with counted((vae, "encode"), (encoder, "encode_token_weights")) as counts:
        first = go(a_run(steps=3))
        assert counts == [2, 2], counts  # two pictures; one caption and the empty one
        second = a_run(steps=4)
        outcome = go(second)
        assert counts == [2, 2], "encoded again"
        assert second.store.found == 4 and "4 read from the cache" in outcome.report
        assert outcome.losses[:3] == first.losses, "what is kept is not what was made"
        some = torch.cat([pictures(1), pictures(1, seed=5)])
        go(a_run(of=a_set(pictures=[some]), steps=3))
        assert counts == [3, 2], counts
        go(a_run(of=a_set(pictures=[some], trigger="sks", flips=True), steps=3))
        assert counts == [5, 3], counts
        with torch.inference_mode():
            other = families.make_vae("sd15", seed=1)
            skipping = clip.clone()
            skipping.clip_layer(-2)
        go(a_run(of_parts=(model, clip, other), steps=3))
        assert counts[1] == 3
        go(a_run(of_parts=(model, skipping, vae), steps=3))
        assert counts == [5, 5], counts
        # Trained text encoders change, so nothing of them is kept.
        made = set(second.store.folder.iterdir())
        run = a_run(steps=3, config={"text_encoder_lr": 0.01}, sample_every=1)
        go(run)
        assert set(second.store.folder.iterdir()) == made and run.store.found == 2  # the pictures
        # A damaged file is made again.
        for path in made:
            path.write_bytes(path.read_bytes()[:40])
        count = counts[0]
        assert go(a_run(steps=5)).losses[:3] == first.losses and counts[0] == count + 2
    assert not list(second.store.folder.glob("*.partial"))


def test_the_cache_stays_within_its_limit():
    fresh_user()
    folder = train_run.state_root() / "cache"
    store = train_store.Store(folder, limit=10**9)
    value = [[torch.randn(10, 100), {"pooled_output": None, "n": 3, "x": (torch.ones(2), "a")}]]
    for i in range(5):
        path = store.path("text", i)
        store.put(path, value)
        os.utime(path, (1e9 + i, 1e9 + i))
    again = train_store.Store(folder, limit=2 * path.stat().st_size)
    back = again.get(store.path("text", 1))  # now used last
    assert torch.equal(back[0][0], value[0][0]) and back[0][1]["n"] == 3 and back[0][1]["x"][1] == "a"
    (folder / "x.part").write_bytes(b"")
    assert again.prune() == 3 * path.stat().st_size
    assert {p for p in folder.glob("*.safetensors")} == {store.path("text", i) for i in (1, 4)}
    tight = train_store.Store(folder, limit=0)
    tight.get(store.path("text", 1))
    tight.prune()
    assert [p for p in folder.glob("*.safetensors")] == [store.path("text", 1)], "a run lost what it uses"
    raises(TypeError, lambda: train_store.fingerprint([object()]), "object")


def test_the_base_models_file_is_found():
    """From the patcher, as later hosts note it, or through the graph; its hash is read once."""
    folder = Path(folder_paths.get_folder_paths("checkpoints")[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.safetensors").write_bytes(b"weights")
    (Path(folder_paths.get_folder_paths("loras")[0]) / "l.safetensors").write_bytes(b"lora")
    model = parts("sd15")[0]
    graph = {
        "1": {"inputs": {"ckpt_name": "a.safetensors"}},
        "2": {"inputs": {"model": ["1", 0], "lora_name": "a.safetensors", "strength": 1.0}},
        "3": {"inputs": {"model": ["2", 0], "name": "x"}},
        "4": {"inputs": {"text": "a.safetensor"}},
        "5": {"inputs": {"model": ["4", 0]}},
        "6": {"inputs": {"model": ["6", 0]}},
    }
    find = train_identity.model_file
    assert find(model, graph, "3") == folder / "a.safetensors" == find(model, graph, 2)
    assert [find(model, graph, n) for n in ("5", "6", "7")] == [None] * 3 and find(model, None, "3") is None
    with torch.inference_mode():
        noted = model.clone()
    noted.cached_patcher_init = (len, (str(folder / "a.safetensors"), {}))
    assert find(noted, None, None) == folder / "a.safetensors"
    fresh_user()
    store = train_store.Store(train_run.state_root() / "cache")
    expected = hashlib.sha256(b"weights").hexdigest()
    with counted((hashlib, "sha256")) as counts:
        assert train_store.file_hash(folder / "a.safetensors", store) == expected
        once = counts[0]
        assert train_store.file_hash(folder / "a.safetensors", store) == expected
        assert counts[0] - once < once and store.found == 1
    (folder / "a.safetensors").write_bytes(b"other weights")
    assert train_store.file_hash(folder / "a.safetensors", store) != expected


def test_old_runs_are_removed_and_unfinished_ones_stay():
    fresh_user()
    root, day = train_run.state_root(), 86400
    now = time.time()

    def run(name, age, states=(), results=(), below=()):
        folder = root / name.ljust(24, "0")
        (folder / "9 steps").mkdir(parents=True)
        for step in states:
            (folder / f"state-{step:08d}.safetensors").write_bytes(b"x" * 1000)
        for step in below:
            (folder / "9 steps" / f"state-{step:08d}.safetensors").write_bytes(b"x")
        for step in results:
            core_run.write_json(folder / f"result-{step}.json", {"steps": step})
        for path in folder.rglob("*"):
            os.utime(path, (now - age * day,) * 2)
        return folder

    done = [run(f"a{i}", age=40 + i, states=(5, 10), results=(10,)) for i in range(4)]
    more = run("b0", age=10, states=(10, 15), results=(10,))  # stopped on the way to more steps
    shorter = run("b1", age=10, states=(20,), results=(20,), below=(4,))
    young, old = run("c0", age=29, states=(3,)), run("c1", age=31, states=(3,))
    current = run("d0", age=90, states=(3,))
    for name in ("class", "cache", "notes of mine"):
        (root / name).mkdir()
    said = train_store.prune_runs(root, current, keep=2, days=30)
    left = {p for p in root.iterdir() if len(p.name) == 24}
    assert left == {*done[:2], more, shorter, young, current}, sorted(p.name for p in left)
    assert old not in left and "3 earlier runs" in said, said
    assert {"class", "cache", "notes of mine"} < {p.name for p in root.iterdir()}
    # Runs of the node themselves count as finished or not in the same way, and the report says what went.
    fresh_user()
    with replaced(train_store.prune_runs, "__defaults__", (2, 30)):
        names = [go(a_run(steps=2, seed=seed)) for seed in range(3)]
        with stopped_at(1), contextlib.suppress(train_mode.Stopped):
            go(a_run(steps=2, seed=9))
        last = go(a_run(steps=2, seed=4))
    kinds = [run.finished for run in train_store.past_runs(train_run.state_root())]
    assert kinds.count(True) == 2 + 1 and kinds.count(False) == 1, kinds
    assert "earlier runs" in last.report and "Removed" not in names[0].report
    assert all(Path(one.adapter.path).is_file() for one in names), "an adapter was removed"


def test_samples_and_saves_while_it_runs():
    fresh_user()
    seen = []

    def hook(value, total, preview, node_id=None):
        seen.append((value, total, preview))

    with replaced(comfy.utils, "PROGRESS_BAR_HOOK", hook):
        run = a_run(
            steps=6,
            sample_every=2,
            save_every=3,
            sample_prompts="ohwx in a boat\n\nohwx in snow\n",
            name="training/live",
        )
        outcome = go(run)
    assert outcome.samples.shape == (6, 64, 64, 3)  # after 2, 4, 6 steps, two prompts each
    assert torch.equal(outcome.samples[0], outcome.samples[0]) and not torch.equal(
        outcome.samples[0], outcome.samples[4]
    )
    shown = [p for _, _, p in seen if p is not None]
    assert len(shown) >= 6 and all(p[0] == "JPEG" and p[2] == 512 for p in shown)
    assert max(v for v, *_ in seen) == 6
    beside = sorted(p.name for p in run.path.parent.glob("live*"))
    assert beside == ["live_00001_.safetensors", "live_00001_step000003.safetensors"], beside
    # Looking at samples does not change what is learnt.
    fresh_user()
    same(learnt(go(a_run(steps=6))), learnt(outcome))
    curve = core_run.loss_curve(outcome.losses)
    assert curve.shape == (1, 320, 640, 3) and curve.min() < 0.9
    assert core_run.loss_curve([1.0]).shape == core_run.loss_curve([0.5] * 9).shape


def test_an_interrupted_sample_is_drawn_when_the_run_goes_on():
    fresh_user()
    options = {"steps": 6, "sample_every": 2, "sample_prompts": "ohwx in a boat\nohwx in snow"}
    whole = a_run(**options)
    outcome = go(whole)
    expected = {name: (whole.folder / name).read_bytes() for name in whole.sample_files}
    for finished in (0, 1):
        fresh_user()
        first = a_run(**options)
        draw = first.host.draw

        def stop(*args, run=first, finished=finished, draw=draw):
            images = draw(*args)
            if run.trainer.step == 4:
                for name, image in list(zip(run._sample_names(4), images, strict=True))[:finished]:
                    dataset.to_pillow(image).save(run.folder / name)
                raise train_mode.Stopped
            return images

        first.host.draw = stop
        with contextlib.suppress(train_mode.Stopped):
            go(first)
        assert first.trainer.step == 4
        rest = a_run(**options)
        done = go(rest)
        assert rest.resumed == 4 and len(expected) == 6
        for name, content in expected.items():
            assert (rest.folder / name).read_bytes() == content, f"{name} differs"
        same(learnt(done), learnt(outcome))
        assert done.losses == outcome.losses and torch.equal(done.samples, outcome.samples[2:])
    # Stopped after the samples were drawn: they are not drawn again.
    fresh_user()
    first = a_run(**options)
    with contextlib.suppress(train_mode.Stopped), replaced(Trainer, "_one_step", stop_before(4)):
        go(first)
    assert first.trainer.step == 4 and len(list((first.folder / "samples").iterdir())) == 4
    rest = a_run(**options)
    with counted((rest.host, "draw")) as counts:
        go(rest)
    assert rest.resumed == 4 and counts == [1], counts


def test_samples_of_other_settings_have_files_of_their_own():
    """The run is the same, so its folder is: what was drawn for the first settings is put out for these again."""
    fresh_user()
    for options in ({"sample_prompts": "ohwx in snow"}, {"config": {"sample_steps": 3}}, {"sample_every": 1}):
        first = go(a_run(steps=2))
        other = a_run(steps=2, **options)
        drawn = go(other)
        assert other.resumed == 2, "trained again"
        again = go(a_run(steps=2, **options))
        assert "nothing was trained again" in again.report and torch.equal(again.samples, drawn.samples)
        assert torch.equal(go(a_run(steps=2)).samples, first.samples), f"drawn over by {options}"
