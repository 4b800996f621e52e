"""The loop: exact resume, kills, accumulation, stopping, failures, prior preservation, masks, optimizers."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from oft_core.training import (
    OPTIMIZERS,
    ConfigError,
    Loaded,
    Objective,
    OFTConfig,
    Record,
    RotationBank,
    StateError,
    Trainer,
    TrainingError,
    TrainSettings,
    checkpointing,
)
from oft_core.training.checkpoint import load_latest, load_state, save_state, saved_states
from oft_core.training.optim import make_optimizer, schedule

REPO = Path(__file__).resolve().parents[2]


class Denoiser(nn.Module):
    """A small conditional model on latents (B, 2, 4, 4): two blocks of linear layers, timestep and caption added."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(2)])
        self.text = nn.Linear(8, 32)

    def forward(self, x, timestep, words):
        h = x.flatten(1) + self.text(words) + torch.sin(timestep.float() / 100).unsqueeze(1)
        for block in self.blocks:
            h = h + block(h)
        return h.view(x.shape)


def words_of(records, drop):
    """Captions as vectors; the empty caption is zero."""
    vectors = []
    for r, dropped in zip(records, drop, strict=True):
        g = torch.Generator().manual_seed(sum(map(ord, r.caption)))
        vectors.append(torch.zeros(8) if dropped else torch.randn(8, generator=g))
    return torch.stack(vectors)


def latents_of(records):
    return torch.stack([torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(sum(map(ord, r.name)))) for r in records])


RECORDS = [Record(f"p{i}", f"a photo {i}", (64, 64)) for i in range(5)]


class Rig:
    """A trainer over the small model; everything is made anew, as in a new process."""

    def __init__(self, state_dir=None, *, config=None, objective=None, predict=None, records=RECORDS, load=None, trainer=None, **settings):
        torch.manual_seed(0)
        self.model = Denoiser()
        options = {"oft_block_size": 8, "target_modules": "all-linear", **(config or {})}
        oft = OFTConfig(**options)
        te = OFTConfig(**{**options, "target_modules": ["text"], "modules_to_save": None})
        oft.exclude_modules = ["text"]
        self.bank = RotationBank({"unet": (self.model, oft.select(self.model)), "te1": (self.model, te.select(self.model))}, seed=3)
        self.losses = []
        self.trainer = Trainer(
            self.bank, TrainSettings(**{"steps": 10, "lr": 0.01, "seed": 7, **settings}), objective or Objective(),
            records, load=load or (lambda r: Loaded(latents_of(r))), predict=predict or self.predict, state_dir=state_dir,
            progress=lambda p: self.losses.append(p.loss), **(trainer or {}),
        )

    def predict(self, noised, records):
        return self.model(noised.x_t, noised.timestep, words_of(records, noised.drop))

    def everything(self) -> dict[str, torch.Tensor]:
        """Every number that the next step could depend on."""
        out = {f"p/{n}": t for n, t in self.bank.state_dict().items()}
        for i, entry in self.trainer.optimizer.state_dict()["state"].items():
            out.update({f"o/{i}/{k}": v for k, v in entry.items() if isinstance(v, torch.Tensor)})
        if self.trainer.ema:
            out.update({f"e/{n}": t for n, t in self.trainer.ema.items()})
        return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# -------------------------------------------------------------------- resume


RUNS = {
    "plain": {},
    "all at once": {
        "accumulation": 2, "batch_size": 2, "ema": 0.9, "schedule": "cosine", "warmup": 3, "part_lr": {"te1": 0.003},
        "config": {"module_dropout": 0.3, "coft": True, "eps": 0.5, "rescale": True, "bias": "oft_only"},
        "objective": Objective(prediction="v", min_snr_gamma=5, noise_offset=0.1, caption_dropout=0.3),
    },
    "flow, series, cap": {
        "config": {"use_cayley_neumann": True, "angle_cap": 3.0}, "objective": Objective(prediction="flow", sampling="logit_normal"),
        "loss_scale": 1024.0,
    },
    "prior": {"prior": "match", "trainer": {"class_records": [Record("c", "a thing", (64, 64))]}},
}


@pytest.mark.parametrize("name", RUNS)
def test_stop_and_resume_is_bit_for_bit_the_uninterrupted_run(tmp_path, name):
    whole = Rig(**RUNS[name])
    result = whole.trainer.run()
    assert result.step == 10 and not result.stopped

    settings = {**RUNS[name], "trainer": {**RUNS[name].get("trainer", {}), "should_stop": lambda: len(first.losses) == 4}}
    first = Rig(tmp_path, **settings)
    stopped = first.trainer.run()
    assert stopped.stopped and stopped.step == 4
    torch.rand(17)  # the global random state must not matter
    second = Rig(tmp_path, **RUNS[name])
    assert second.trainer.resume()
    rest = second.trainer.run()
    assert rest.losses == result.losses and rest.step == 10
    assert same(whole.everything(), second.everything())
    assert not same(whole.everything(), first.everything())


@pytest.mark.parametrize("optimizer", [o for o in OPTIMIZERS])
def test_exact_resume_with_every_optimizer(tmp_path, optimizer):
    settings = {"optimizer": optimizer, "lr": 1.0 if optimizer == "prodigy" else 0.003, "sample_every": 3}
    try:
        whole = Rig(**settings, trainer={"sample": lambda step, values: None})
    except TrainingError as missing:
        pytest.skip(str(missing))
    whole.trainer.run()
    assert any(p.abs().max() > 0 for p in whole.bank.parameters.values())
    first = Rig(tmp_path, **settings)
    first.trainer.should_stop = lambda: first.trainer.step == 5
    first.trainer.run()
    second = Rig(tmp_path, **settings)
    assert second.trainer.resume()
    second.trainer.run()
    assert same(whole.everything(), second.everything())


def turned(target: float, **settings) -> tuple[list[float], float]:
    """Angles in degrees, and loss, after training 4 channels towards rotations by ``target`` degrees in planes of two."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    config = OFTConfig(oft_block_size=2, target_modules="all-linear", angle_cap=settings.pop("angle_cap", 60.0), **settings.pop("config", {}))
    bank = RotationBank({"unet": (model, config.select(model))})
    a = torch.tensor(target).deg2rad()
    turn = torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]])
    goal = model[0].weight.detach() @ torch.block_diag(turn, turn).T
    random = torch.Generator().manual_seed(1)

    def predict(noised, records):
        x = noised.x0.permute(0, 2, 3, 1)
        return Objective().target(noised) + (model(x) - x @ goal.T).permute(0, 3, 1, 2)

    trainer = Trainer(
        bank, TrainSettings(weight_decay=0.0, clip=0.0, **settings), Objective(), [Record("a", "", (8, 8))],
        load=lambda records: Loaded(torch.randn(1, 4, 4, 4, generator=random)), predict=predict,
    )
    trainer.run()
    with bank.installed(), bank.evaluation(trainer.values()):
        made = model(torch.eye(4)).T.detach()
    own = torch.linalg.lstsq(model[0].weight.detach(), made).solution.T  # M of W' = W M^T
    return torch.atan2(own[1::2, ::2].diagonal(), own[::2, ::2].diagonal()).rad2deg().tolist(), trainer.losses[-1]


def test_adafactor_turns_as_far_as_adamw():
    """Its own default measures steps by the parameter's size, which is nothing where rotations begin."""
    (own, _), (adamw, _) = (turned(150, optimizer=o, steps=100, lr=0.01) for o in ("adafactor", "adamw"))
    assert min(adamw) > 30 and all(0.7 * a < b < 1.3 * a for a, b in zip(adamw, own, strict=True)), (adamw, own)


@pytest.mark.parametrize("limit", [{"angle_cap": 10.0}, {"config": {"coft": True, "eps": 0.1}}])
def test_a_schedule_free_mean_stays_at_the_limit(limit):
    """A point behind the mean that runs on beyond the limit would carry what is exported past it, and then to the other side."""
    pytest.importorskip("schedulefree")
    for steps in (100, 300, 600):
        adamw, loss = turned(150, optimizer="adamw", steps=steps, lr=0.01, **limit)
        mean, other = turned(150, optimizer="schedulefree", steps=steps, lr=0.01, **limit)
        assert all(0.9 * a < b <= a + 0.01 for a, b in zip(adamw, mean, strict=True)), (steps, adamw, mean)
        assert abs(other - loss) < 0.1 * loss


def test_prodigy_with_several_rates_is_refused():
    pytest.importorskip("prodigyopt")
    with pytest.raises(ConfigError, match="one learning rate.*part_lr"):
        Rig(optimizer="prodigy", lr=1.0, part_lr={"te1": 0.5})
    Rig(optimizer="prodigy", lr=1.0, part_lr={"te1": 0.0}).trainer.run()


def test_eight_bit_state_is_really_eight_bit_and_resumes_exactly(tmp_path):
    """bitsandbytes keeps small parameters in float32 unless it is told otherwise, so the test above says nothing about 8 bits."""
    pytest.importorskip("bitsandbytes")
    settings = {"optimizer": "adamw8bit", "lr": 0.01, "optimizer_args": {"min_8bit_size": 16}}
    whole = Rig(**settings)
    whole.trainer.run()
    states = [s[k].dtype for s in whole.trainer.optimizer.state.values() for k in ("state1", "state2")]
    assert states and set(states) == {torch.uint8}
    plain = Rig(lr=0.01)
    plain.trainer.run()
    for name, p in whole.bank.parameters.items():
        other = plain.bank.parameters[name]
        assert 0 < (p - other).norm() < 0.1 * other.norm(), name  # rounded, and still AdamW
    first = Rig(tmp_path, **settings)
    first.trainer.should_stop = lambda: first.trainer.step == 5
    first.trainer.run()
    second = Rig(tmp_path, **settings)
    assert second.trainer.resume()
    second.trainer.run()
    assert same(whole.everything(), second.everything())


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(TrainingError, match="pip install prodigyopt"):
        make_optimizer("prodigy", [{"params": [nn.Parameter(torch.zeros(2))]}], 1.0)
    with pytest.raises(ConfigError, match="does not take these arguments"):
        make_optimizer("adamw", [{"params": [nn.Parameter(torch.zeros(2))]}], 1.0, beta=3)


def test_the_same_inputs_give_the_same_numbers_and_another_seed_does_not():
    a, b, c = Rig(), Rig(), Rig(seed=8)
    for rig in (a, b, c):
        rig.trainer.run()
    assert a.losses == b.losses and same(a.everything(), b.everything())
    assert a.losses != c.losses


def test_a_state_of_other_settings_is_refused_and_the_fields_are_named(tmp_path):
    Rig(tmp_path, steps=2).trainer.run()
    other = Rig(tmp_path, lr=0.02, config={"angle_cap": 30.0}, objective=Objective(min_snr_gamma=5.0))
    with pytest.raises(StateError) as fault:
        other.trainer.resume()
    text = str(fault.value)
    for word in ("settings.lr = 0.01", "settings.lr = 0.02", "unet.angle_cap = 60.0", "unet.angle_cap = 30.0", "objective.min_snr_gamma"):
        assert word in text
    assert "settings.seed" not in text and "unet.eps" not in text
    with pytest.raises(StateError, match="pictures"):
        Rig(tmp_path, records=RECORDS[:3]).trainer.resume()
    with pytest.raises(StateError, match="model"):
        Rig(tmp_path, trainer={"fingerprint": {"model": "abc"}}).trainer.resume()
    # More steps, other intervals: still the same run.
    more = Rig(tmp_path, steps=4, save_every=1, keep=5)
    assert more.trainer.resume() and more.trainer.run().step == 4


def test_nothing_to_resume_is_told_apart_from_damage(tmp_path):
    assert not Rig(tmp_path).trainer.resume()
    Rig(tmp_path, steps=4, save_every=2).trainer.run()
    newest, older = saved_states(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    rig = Rig(tmp_path)
    assert rig.trainer.resume() and rig.trainer.step == 2
    older.write_bytes(b"")
    with pytest.raises(StateError, match="No saved state can be read.*[Ss]witch resume off"):
        Rig(tmp_path).trainer.resume()


def test_the_last_states_are_kept_and_leftovers_removed(tmp_path):
    (tmp_path / ".state-00000001.safetensors.99.partial").mkdir()
    (tmp_path / ".state-00000001.safetensors.99.partial" / ".tmpAb12").write_bytes(b"half")
    Rig(tmp_path, steps=7, save_every=2, keep=2).trainer.run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state-00000006.safetensors", "state-00000007.safetensors"]


def test_states_of_later_steps_do_not_push_the_newest_out(tmp_path):
    """A run that went on before a damaged state, or a new one in a folder that holds another's."""
    for step in (200, 300):
        save_state(tmp_path, step, {"a": step}, {})
    saved_states(tmp_path)[0].write_bytes(b"cut")
    assert load_latest(tmp_path)[0] == 200
    save_state(tmp_path, 250, {"a": 250}, {}, keep=1)
    assert load_latest(tmp_path) == (250, {"a": 250})
    assert [p.name[6:14] for p in saved_states(tmp_path)] == ["00000300", "00000250"]


def test_state_round_trip_keeps_types_and_bits(tmp_path):
    state = {
        "t": torch.tensor([1.5, float("nan")]), "zero": torch.tensor(3), "list": [1, 2.5, None, True, "x"],
        "tuple": (0.9, 0.999), "ints": {0: {"a": float("inf")}, 5: {}}, "bytes": torch.arange(4, dtype=torch.uint8),
        "a.b": torch.ones(1), "a": {"b": torch.zeros(1)},
    }
    save_state(tmp_path, 3, state, {})
    step, back = load_latest(tmp_path)
    assert step == 3 and back["tuple"] == (0.9, 0.999) and back["ints"] == state["ints"] and back["list"] == state["list"]
    for k in ("t", "zero", "bytes", "a.b"):
        assert back[k].dtype == state[k].dtype and torch.equal(back[k].nan_to_num(), state[k].nan_to_num())
    assert back["a"]["b"].item() == 0


KILLED = """
    import sys, torch
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from oft_core.training.checkpoint import save_state
    step = 0
    while True:
        step += 1
        big = torch.full((400_000,), float(step))
        save_state(Path(sys.argv[2]), step, {"a": big, "step": step}, {"x": 1})
        print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_good_state(tmp_path):
    """SIGKILL at random moments of a process that does nothing but save; the newest state is complete and no older than the last
    one that was reported."""
    rng = random.Random(0)
    interrupted = tries = 0
    while tries < 3 or not interrupted and tries < 20:
        tries += 1
        for old in tmp_path.iterdir():
            old.unlink()
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(REPO), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        reported = [process.stdout.readline()]
        time.sleep(rng.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        reported += process.stdout.read().split()
        process.wait()
        interrupted += any(tmp_path.glob(".*"))
        last = int([r for r in reported if r.strip()][-1])
        step, state = load_latest(tmp_path, {"x": 1})
        assert step >= last and state["step"] == step and bool((state["a"] == step).all())
        for path in saved_states(tmp_path):
            load_state(path)
        save_state(tmp_path, step + 1, {}, {})
        assert all(p.name.startswith("state-") for p in tmp_path.iterdir()), "what the kill left is still there"
    assert interrupted, "no kill hit a save, so the test proves nothing"


# -------------------------------------------------------------------- accumulation, checkpointing


def test_accumulation_equals_the_big_batch():
    big, small, wrong = Rig(batch_size=4), Rig(accumulation=4), Rig(accumulation=2, batch_size=1)
    for rig in (big, small, wrong):
        rig.trainer.run()
    torch.testing.assert_close(torch.tensor(big.losses), torch.tensor(small.losses), rtol=1e-5, atol=1e-6)
    for n, p in big.bank.parameters.items():
        torch.testing.assert_close(p, small.bank.parameters[n], rtol=1e-3, atol=2e-5)
        assert (p - wrong.bank.parameters[n]).abs().max() > 1e-3


def test_gradient_checkpointing_changes_nothing_and_is_removed():
    plain = Rig()
    plain.trainer.run()
    rig = Rig()
    inside = []
    rig.trainer.around = lambda: checkpointing(rig.model.blocks)
    rig.trainer.progress = lambda p: inside.append("forward" in rig.model.blocks[0].__dict__)
    rig.trainer.run()
    assert same(plain.everything(), rig.everything()) and all(inside)
    assert "forward" not in rig.model.blocks[0].__dict__
    with pytest.raises(KeyError), checkpointing(rig.model.blocks):
        raise KeyError
    assert "forward" not in rig.model.blocks[0].__dict__


# -------------------------------------------------------------------- it learns, it stops, it fails well


def test_it_learns_and_the_average_and_the_sample_see_it():
    seen = []
    rig = Rig(steps=150, ema=0.9, sample_every=50, batch_size=5, objective=Objective(prediction="flow"))

    def sample(step, values):
        assert not torch.is_grad_enabled() or not rig.model(torch.ones(1, 2, 4, 4), torch.ones(1), torch.ones(1, 8)).requires_grad
        tensors = rig.bank.adapter_tensors(values)
        seen.append((step, rig.model(torch.ones(1, 2, 4, 4), torch.ones(1), torch.ones(1, 8)).detach(), len(tensors)))

    rig.trainer.sample = sample
    rig.trainer.run()
    assert sum(rig.losses[-20:]) < 0.8 * sum(rig.losses[:20])
    assert [s[0] for s in seen] == [50, 100, 150] and seen[0][2] == 5
    assert not torch.equal(seen[0][1], seen[1][1])
    with rig.bank.installed(), rig.bank.evaluation(rig.trainer.values()):
        now = rig.model(torch.ones(1, 2, 4, 4), torch.ones(1), torch.ones(1, 8))
    assert torch.equal(now, seen[-1][1])
    with rig.bank.installed(), rig.bank.evaluation():
        assert not torch.equal(rig.model(torch.ones(1, 2, 4, 4), torch.ones(1), torch.ones(1, 8)), now)


def test_sampling_does_not_change_the_run():
    plain, sampled = Rig(), Rig(sample_every=1, trainer={"sample": lambda step, values: torch.rand(3)})
    for rig in (plain, sampled):
        rig.trainer.run()
    assert same(plain.everything(), sampled.everything())


def test_a_sample_that_was_interrupted_is_drawn_after_a_resume(tmp_path):
    """Before the next step, with the values that it was to show; once only, and the run stays the same."""
    class Interrupted(Exception):
        pass

    def drawer(drawn, fails_at=()):
        def sample(step, values):
            if step in fails_at:
                raise Interrupted
            drawn.append((step, float(values["te1/rotation/8"].norm())))
        return {"sample": sample}

    whole, first, rest = [], [], []
    settings = {"steps": 6, "sample_every": 2, "ema": 0.9}
    plain = Rig(trainer=drawer(whole), **settings)
    plain.trainer.run()
    stopped = Rig(tmp_path, trainer=drawer(first, fails_at=(4,)), **settings)
    with pytest.raises(Interrupted):
        stopped.trainer.run()
    again = Rig(tmp_path, trainer=drawer(rest), **settings)
    assert again.trainer.resume() and again.trainer.step == 4
    again.trainer.run()
    assert [s for s, _ in whole] == [2, 4, 6] and first + rest == whole
    assert same(plain.everything(), again.everything())
    # The same trainer again, and one that was stopped after the sample was drawn.
    stopped.trainer.sample = drawer(more := [])["sample"]
    stopped.trainer.run()
    assert first + more == whole
    assert not again.trainer.run().stopped and first + rest == whole


def test_stop_from_outside_ends_at_the_next_step():
    rig = Rig()
    rig.trainer.progress = lambda p: rig.trainer.stop() if p.step == 3 else None
    result = rig.trainer.run()
    assert result.stopped and result.step == 3
    assert rig.trainer.run().step == 10


def base_untouched(rig: Rig) -> bool:
    torch.manual_seed(0)
    fresh = Denoiser()
    x = torch.ones(1, 2, 4, 4), torch.ones(1), torch.ones(1, 8)
    alike = all(torch.equal(a, b) for a, b in zip(fresh.parameters(), rig.model.parameters(), strict=True))
    return alike and torch.equal(fresh(*x), rig.model(*x)) and not any("forward" in m.__dict__ for m in rig.model.modules())


def test_interruption_inside_a_step_keeps_the_last_whole_step(tmp_path):
    class Interrupted(Exception):
        pass

    rig = Rig(tmp_path, accumulation=2)
    calls = []

    def predict(noised, records):
        calls.append(1)
        if len(calls) == 10:
            raise Interrupted
        return rig.predict(noised, records)

    rig.trainer.predict = predict
    with pytest.raises(Interrupted):
        rig.trainer.run()
    assert base_untouched(rig)
    second, whole = Rig(tmp_path, accumulation=2), Rig(accumulation=2)
    assert second.trainer.resume() and second.trainer.step == 4
    second.trainer.run()
    whole.trainer.run()
    assert same(second.everything(), whole.everything())


def test_out_of_memory_is_one_clear_message_and_can_be_continued(tmp_path):
    rig = Rig(tmp_path)
    kept = []

    def predict(noised, records):
        import weakref

        out = rig.predict(noised, records)
        kept.append(weakref.ref(out))
        if rig.trainer.step == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        return out

    rig.trainer.predict = predict
    with pytest.raises(TrainingError) as fault:
        rig.trainer.run()
    text = str(fault.value)
    assert "Out of memory in step 4" in text and "batch size" in text and "3 steps is kept" in text and "Tried to allocate" in text
    assert fault.value.__context__ is None and all(ref() is None for ref in kept)
    assert base_untouched(rig)
    second = Rig(tmp_path)
    assert second.trainer.resume() and second.trainer.run().step == 10


def test_out_of_memory_inside_the_update_keeps_the_state_before_it(tmp_path):
    rig = Rig(tmp_path, save_every=2)

    def half_an_update(real=rig.trainer.optimizer.step):
        real()
        if rig.trainer.step == 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    rig.trainer.optimizer.step = half_an_update
    with pytest.raises(TrainingError, match="state after 4 steps"):
        rig.trainer.run()
    second = Rig(tmp_path)
    assert second.trainer.resume() and second.trainer.step == 4


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("latent", "The latent of p[0-4] is"), ("model", "The model's output for p[0-4], also without what was trained, is"),
        ("trained", "The model's output for p[0-4] with what was trained is"), ("loss", "The loss is"), ("gradient", "The gradient is"),
    ],
)  # fmt: skip
def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_last_good_step(tmp_path, where, named):
    rig = Rig(tmp_path)

    def load(records):
        bad = where == "latent" and rig.trainer.step == 2
        return Loaded(latents_of(records) * (float("nan") if bad else 1))

    def predict(noised, records):
        out = rig.predict(noised, records)
        if rig.trainer.step == 2:
            if where == "gradient":
                out = out + (out - out.detach()).abs().sqrt()
            elif where == "loss":
                out = out * 1e30
            elif where == "model" or where == "trained" and torch.is_grad_enabled():
                out = out * float("nan")
        return out

    rig.trainer.load, rig.trainer.predict = load, predict
    with pytest.raises(TrainingError, match=f"{named} not finite in step 3") as error:
        rig.trainer.run()
    assert ("learning rate" in str(error.value)) == (where in ("trained", "loss", "gradient")), error.value
    assert ("32 NaN" in str(error.value)) == (where not in ("loss", "gradient")), error.value
    assert base_untouched(rig) and all(p.isfinite().all() for p in rig.bank.parameters.values())
    second = Rig(tmp_path)
    assert second.trainer.resume() and second.trainer.step == 2


def test_overflowing_gradients_halve_the_loss_scale():
    rig = Rig(loss_scale=1024.0)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g if rig.trainer._scale < 512 else g * float("inf")

    rig.trainer.predict = lambda n, r: Overflow.apply(rig.predict(n, r))
    result = rig.trainer.run()
    assert rig.trainer._scale == 256 and len(result.notes) == 2 and "skipped" in result.notes[0]


def test_loss_scale_leaves_no_trace_in_float32():
    plain, scaled = Rig(), Rig(loss_scale=1024.0)
    for rig in (plain, scaled):
        rig.trainer.run()
    assert same(plain.everything(), scaled.everything())


# -------------------------------------------------------------------- masks, prior, parts, schedules


def test_masked_loss_ignores_what_is_outside():
    """Two sets of latents that differ only outside the mask train the same; without the mask they do not."""
    inside = torch.zeros(1, 1, 4, 4)
    inside[..., :2] = 1

    def rig(other: float, masked: bool) -> Rig:
        def load(records):
            x = latents_of(records)
            return Loaded(x, inside.expand(len(x), -1, -1, -1) if masked else None)

        def predict(noised, records):
            # A model of single pixels, so that what lies outside cannot reach the inside; ``other`` disturbs the outside only.
            x = noised.x_t + 1 - inside if other else noised.x_t
            h = made.bank.parts["unet"][0].blocks[0][0](x.unsqueeze(-1).expand(*x.shape, 32))
            return h[..., 0]

        made = Rig(load=load, predict=predict, steps=5)
        made.trainer.run()
        return made

    assert rig(0, True).losses == rig(1, True).losses
    assert rig(0, False).losses != rig(1, False).losses


def test_the_angle_cap_holds_after_every_step():
    angles = []
    rig = Rig(config={"angle_cap": 2.0})
    rig.trainer.progress = lambda p: angles.append(
        max(float(piece[0].op.angles().max()) for piece in rig.bank.adapter_tensors().values())
    )
    rig.trainer.run()
    assert max(angles) < math.radians(2.001) and angles[-1] > math.radians(1.999)


def test_prior_pictures_are_mixed_in_with_their_weight():
    seen = []
    classes = [Record("class0", "a dog", (64, 64), role="class"), Record("class1", "a dog", (64, 64), role="class")]

    def run(weight, prior="pictures", count=classes):
        rig = Rig(steps=3, prior=prior, prior_weight=weight, trainer={"class_records": count})
        predict = rig.predict
        rig.trainer.predict = lambda n, r: seen.append((r[0].role, n.noise.clone())) or predict(n, r)
        rig.trainer.run()
        return rig

    alone, zero, one, two = Rig(steps=3), run(0.0), run(1.0), run(2.0)
    alone.trainer.run()
    assert alone.losses[0] == zero.losses[0]
    first = one.losses[0] - alone.losses[0]
    assert first > 0.1 and abs(two.losses[0] - alone.losses[0] - 2 * first) < 1e-5
    assert [s[0] for s in seen[:2]] == ["instance", "class"] and not torch.equal(seen[0][1], seen[1][1])
    with pytest.raises(ConfigError, match="class"):
        Rig(prior="pictures")


def test_prior_matching_holds_the_model_on_class_prompts():
    """At the start the frozen model is matched exactly; after training it is matched better than without."""
    classes = [Record("only a prompt", "a dog", (0, 0))]

    def drift(**options) -> float:
        rig = Rig(steps=40, batch_size=5, lr=0.03, objective=Objective(prediction="flow"), **options)
        rig.trainer.run()
        noised = Objective(prediction="flow").noised(latents_of(RECORDS), 1, 1, range(5))
        words = words_of([classes[0]] * 5, [False] * 5)
        base = rig.model(noised.x_t, noised.timestep, words)
        with rig.bank.installed(), rig.bank.evaluation():
            return float((rig.model(noised.x_t, noised.timestep, words) - base).detach().norm())

    match = {"prior": "match", "trainer": {"class_records": classes}}
    start = Rig(steps=1, **match)
    plain = Rig(steps=1)
    start.trainer.run()
    plain.trainer.run()
    assert start.losses[0] == plain.losses[0]
    assert drift(prior_weight=5.0, **match) < 0.7 * drift()


def test_caption_dropout_reaches_the_host():
    drops = []
    rig = Rig(steps=60, objective=Objective(caption_dropout=0.3))
    predict = rig.predict
    rig.trainer.predict = lambda n, r: drops.append(n.drop[0]) or predict(n, r)
    rig.trainer.run()
    assert 8 < sum(drops) < 30


def test_learning_rates_of_parts():
    rig = Rig(part_lr={"te1": 0.0})
    rig.trainer.run()
    moved = {n: float(p.detach().abs().max()) for n, p in rig.bank.parameters.items()}
    assert moved["te1/rotation/8"] == 0 and moved["unet/rotation/8"] > 0.01
    slow = Rig(part_lr={"te1": 0.001}, weight_decay=0.0)
    slow.trainer.run()
    moved = {n: float(p.detach().abs().max()) for n, p in slow.bank.parameters.items()}
    assert moved["te1/rotation/8"] < 0.0101 and moved["unet/rotation/8"] > 0.03
    with pytest.raises(ConfigError, match="part_lr"):
        Rig(part_lr={"te9": 0.1})


def test_decay_pulls_back_to_the_model_and_leaves_whole_modules():
    def size(**more):
        rig = Rig(steps=30, lr=0.003, config={"rescale": True, "bias": "oft_only", "modules_to_save": ["blocks.1.2"]}, **more)
        before = {n: p.detach().clone() for n, p in rig.bank.parameters.items()}
        rig.trainer.run()
        return {n: float((p.detach() - before[n]).norm()) for n, p in rig.bank.parameters.items()}

    free, held = size(weight_decay=0.0), size(weight_decay=30.0)
    assert {n.split("/")[1] for n in free} == {"rotation", "scale", "bias", "saved"}
    for name in free:
        if "/saved/" in name:
            assert 0.5 < held[name] / free[name] < 2, (name, held[name], free[name])
        else:
            assert held[name] < 0.8 * free[name], (name, held[name], free[name])


def test_schedules():
    assert [schedule("constant", 10, 4)(k) for k in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    assert [schedule("linear", 10, 0)(k) for k in (0, 5, 10)] == [1, 0.5, 0]
    cosine = schedule("cosine", 12, 2)
    assert cosine(2) == 1 and abs(cosine(7) - 0.5) < 1e-9 and cosine(12) < 1e-9
    rates = []
    rig = Rig(schedule="linear", steps=4, warmup=2)
    rig.trainer.progress = lambda p: rates.append(p.lr)
    rig.trainer.run()
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_clipping():
    norms = []
    rig = Rig(clip=1e-3, optimizer="adamw", steps=2)
    rig.trainer.progress = lambda p: norms.append(p.grad_norm)
    seen = []
    real = rig.trainer.optimizer.step
    rig.trainer.optimizer.step = lambda: seen.append(
        torch.cat([p.grad.flatten() for p in rig.bank.parameters.values()]).norm().item()
    ) or real()
    rig.trainer.run()
    assert norms[0] > 0.01 and all(abs(s - 1e-3) < 1e-6 for s in seen)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"steps": 0}, "steps"), ({"lr": 0.0}, "lr"), ({"ema": 1.0}, "ema"), ({"optimizer": "sgdx"}, "optimizer"),
     ({"schedule": "step"}, "schedule"), ({"prior": "both"}, "prior"), ({"loss_scale": 0.5}, "loss_scale"), ({"part_lr": {"a": -1}}, "part_lr")],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(options, word):
    with pytest.raises(ConfigError, match=f"'{word}'"):
        TrainSettings(**options)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("lr", "learning rate"), ("weight_decay", "'weight_decay'"), ("name", "'optimizer'"), ("params", "'target_modules'"),
     ("groups", "'target_modules'")],
)  # fmt: skip
def test_arguments_of_the_optimizer_that_are_settings_are_refused(name, instead):
    with pytest.raises(ConfigError) as fault:
        TrainSettings(optimizer_args={"betas": [0.9, 0.99], name: 1e-3})
    assert all(w in str(fault.value) for w in ("'optimizer_args'", repr(name), instead)), fault.value
