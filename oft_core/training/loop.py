"""The training loop. Host-free: a host hands in what the model predicts and where pictures come from, and gets told how it goes.

A step k depends only on the parameters after step k - 1, the optimizer's state and (seed, k): no random state is carried along, so
a run that was stopped and continued is bit for bit the run that was not.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checkpoint import digest, load_latest, save_state
from .data import Order, Record
from .errors import ConfigError, TrainingError
from .layers import RotationBank
from .objective import Noised, Objective, per_sample_error
from .optim import OPTIMIZERS, SCHEDULES, averaged_values, make_optimizer, schedule

PRIORS = ("none", "pictures", "match")
#: Arguments of optimizers that are settings of their own -> which.
_NOT_ARGUMENTS = {
    "lr": "the learning rate", "weight_decay": "'weight_decay'", "name": "'optimizer'", "params": "'target_modules'",
    "groups": "'target_modules'",
}
#: What to do about numbers that training drove out of range.
_TOO_FAST = "Lower the learning rate; with a float16 model use bfloat16 or float32 or a loss scale."
#: Slots of class pictures, apart from those of instance pictures, so that both get noise of their own.
_CLASS_SLOTS = 1 << 20


@dataclass
class TrainSettings:
    """Numbers of a run. Raises ConfigError (name, value, what is allowed).

    steps: optimizer steps.   batch_size: pictures a forward.   accumulation: forwards a step.   lr: learning rate; part_lr: other
    ones for some parts, {"te1": 5e-5}.   optimizer: see ``optim.OPTIMIZERS``; optimizer_args: its own arguments.   schedule:
    constant, linear or cosine, after ``warmup`` steps.   weight_decay: back to the model as it was; not of ``modules_to_save``.   clip: largest gradient norm, 0 for none.   ema: decay of the running mean
    of the parameters, 0 for none.   prior: ``pictures`` of the class, or ``match`` (the frozen model's own prediction for class
    prompts), with ``prior_weight``.   loss_scale: for float16 models; halves itself when gradients overflow.   save_every,
    sample_every: steps, 0 for never.   keep: states on disk.
    """

    steps: int = 1000
    batch_size: int = 1
    accumulation: int = 1
    lr: float = 1e-3
    part_lr: dict[str, float] = field(default_factory=dict)
    optimizer: str = "adamw"
    optimizer_args: dict[str, object] = field(default_factory=dict)
    weight_decay: float = 0.01
    schedule: str = "constant"
    warmup: int = 0
    clip: float = 1.0
    ema: float = 0.0
    seed: int = 0
    prior: str = "none"
    prior_weight: float = 1.0
    loss_scale: float = 1.0
    save_every: int = 0
    sample_every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        def need(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ConfigError(f"Option '{name}' is out of range", found=repr(getattr(self, name)), expected=expected)

        for name in ("steps", "batch_size", "accumulation", "keep"):
            need(name, getattr(self, name) >= 1, "1 or more")
        for name in ("warmup", "save_every", "sample_every", "weight_decay", "clip", "prior_weight"):
            need(name, getattr(self, name) >= 0, "0 or more")
        need("lr", 0 < self.lr < math.inf, "more than 0")
        need("part_lr", all(0 <= v < math.inf for v in self.part_lr.values()), "0 or more for every part")
        need("ema", 0 <= self.ema < 1, "0 up to below 1")
        need("loss_scale", 1 <= self.loss_scale < math.inf, "1 or more")
        need("optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS))
        need("schedule", self.schedule in SCHEDULES, " or ".join(SCHEDULES))
        need("prior", self.prior in PRIORS, " or ".join(PRIORS))
        for name in self.optimizer_args:
            if name in _NOT_ARGUMENTS:
                raise ConfigError(
                    f"Option 'optimizer_args' cannot hold {name!r}", found=f"{name} = {self.optimizer_args[name]!r}",
                    expected=f"arguments such as betas; for this there is {_NOT_ARGUMENTS[name]}",
                )

    def fingerprint(self) -> dict[str, object]:
        """What a resumed run must share. The number of steps counts only where the schedule depends on it."""
        out = asdict(self)
        for name in ("save_every", "sample_every", "keep"):
            del out[name]
        if self.schedule == "constant":
            del out["steps"]
        return out


@dataclass(frozen=True)
class Loaded:
    """A batch's latents (batch, channels, ...), as the model's own space has them, and masks (batch, 1, ...) of that size or None."""

    latents: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Progress:
    """After a step: steps done, of how many, this step's loss, gradient norm and learning rate, seconds of this run so far."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a run left: steps done, whether it was stopped, the losses of all steps, remarks. The bank holds the parameters."""

    step: int
    stopped: bool
    losses: list[float]
    notes: list[str]


class Trainer:
    """A run over a bank of rotations.

    load(records) -> Loaded: latents of a batch, all of one bucket.
    predict(noised, records) -> Tensor: the model's prediction in the objective's target space (see ``Objective.from_denoised``), with
    gradients; items whose ``noised.drop`` is True get the empty caption. Text encoders that are trained run in here too.
    class_records: pictures (``prior="pictures"``) or only prompts (``"match"``) of the class.
    state_dir: where states are written; None for never.   around: a context for the whole run, such as ``checkpointing(blocks)``.
    progress(Progress), sample(step, values), should_stop() -> bool: called between steps. ``sample`` runs while the model answers
    with the trained rotations and without gradients; ``values`` goes to ``bank.adapter_tensors`` for the same as an adapter. It is
    called again where a run goes on from a step with samples, since it may have been interrupted; a host that has them can pass.
    fingerprint: what else a resumed run must share (the model's hash, for example), plain values.
    """

    def __init__(
        self,
        bank: RotationBank,
        settings: TrainSettings,
        objective: Objective,
        records: Sequence[Record],
        *,
        load: Callable[[list[Record]], Loaded],
        predict: Callable[[Noised, list[Record]], Tensor],
        class_records: Sequence[Record] = (),
        state_dir: str | Path | None = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
        progress: Callable[[Progress], None] | None = None,
        sample: Callable[[int, dict[str, Tensor] | None], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        fingerprint: Mapping[str, object] | None = None,
    ):
        self.bank, self.settings, self.objective = bank, settings, objective
        self.load, self.predict, self.around = load, predict, around
        self.progress, self.sample, self.should_stop = progress, sample, should_stop
        self.state_dir = None if state_dir is None else Path(state_dir)
        self.order = Order(records, settings.batch_size, settings.seed)
        self.class_order: Order | None = None
        if settings.prior != "none":
            if not class_records:
                raise ConfigError("Prior preservation needs class pictures or prompts", found="none", expected="class_records")
            # Prompts to match have no size of their own: they take the latents' of the instance batch.
            same = [Record(r.name, r.caption, (0, 0), r.repeats, role="class") for r in class_records]
            source = same if settings.prior == "match" else list(class_records)
            self.class_order = Order(source, settings.batch_size, settings.seed + 1)
        unknown = set(settings.part_lr) - set(bank.parts)
        if unknown:
            raise ConfigError("'part_lr' names parts that are not trained", found=sorted(unknown), expected=sorted(bank.parts))
        # Decay pulls what is learnt back to the model; of whole modules it would pull the model itself to zero.
        saved, groups = set(map(id, bank.saved())), []
        for part, params in bank.groups().items():
            lr = settings.part_lr.get(part, settings.lr)
            whole = [p for p in params if id(p) in saved]
            groups += [{"params": [p for p in params if id(p) not in saved], "lr": lr}]
            groups += [{"params": whole, "lr": lr, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        # A part with learning rate 0 is not trained; optimizers refuse 0.
        self._frozen = [p for g in groups if g["lr"] == 0 for p in g["params"]]
        groups = [g for g in groups if g["lr"] > 0]
        if not groups:
            raise ConfigError("Every learning rate is 0, so nothing would be trained", found=settings.part_lr)
        if settings.optimizer == "prodigy" and len({g["lr"] for g in groups}) > 1:
            raise ConfigError(
                "Prodigy finds one learning rate for all parts, so they cannot have several", found=f"'part_lr' {settings.part_lr}",
                expected=f"{settings.lr:g} or 0 for every part",
            )
        self.optimizer = make_optimizer(
            settings.optimizer, groups, settings.lr, settings.weight_decay, **settings.optimizer_args
        )
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self._base_lr = [g["lr"] for g in groups]
        self._factor = schedule(settings.schedule, settings.steps, settings.warmup)
        self.ema = {n: p.detach().clone() for n, p in bank.parameters.items()} if settings.ema else None
        self.step = 0
        self.losses: list[float] = []
        self.notes: list[str] = []
        self._scale = settings.loss_scale
        self._stop = False
        self._updating = False
        self._saved_step: int | None = None
        self._sampled_step = 0
        self._extra = dict(fingerprint or {})

    # ---------------------------------------------------------------- control

    def stop(self) -> None:
        """End the run after the step in progress, keeping everything. May be called from another thread."""
        self._stop = True

    def values(self) -> dict[str, Tensor] | None:
        """Parameter values to sample and export with: the running mean, a schedule-free optimizer's mean, or None (as they are)."""
        if self.ema is not None:
            return {n: t.clone() for n, t in self.ema.items()}
        return averaged_values(self.optimizer, self.bank.parameters)

    def run(self) -> Result:
        """Train up to ``settings.steps`` or until stopped; the state is written at the end, on stop, and when anything goes wrong.

        Raises TrainingError (out of memory, loss not finite); what the host's callbacks raise passes through. In every case the
        models are as before, and the last complete step is kept in the bank and on disk.
        """
        self._stop = False
        started = time.monotonic()
        memory: str | None = None
        try:
            with self.bank.installed(), self.around():
                if self.step < self.settings.steps:
                    self._sample()
                while self.step < self.settings.steps:
                    if self._stop or self.should_stop is not None and self.should_stop():
                        self._stop = True
                        break
                    self._one_step(started)
        except torch.cuda.OutOfMemoryError as error:
            # Raised again below, outside of this block: the traceback would keep the batch's tensors alive.
            memory = str(error).splitlines()[0]
        except BaseException:
            self._save_if_whole()
            raise
        if memory is not None:
            self._free()
            self._save_if_whole()
            raise TrainingError(
                f"Out of memory in step {self.step + 1}", found=memory,
                hint="Lower the batch size or the resolution, switch gradient checkpointing on, or train fewer layers or smaller blocks."
                + self._kept(),
            )
        self._save_if_whole()
        return Result(self.step, self._stop and self.step < self.settings.steps, list(self.losses), list(self.notes))

    # ---------------------------------------------------------------- one step

    def _one_step(self, started: float) -> None:
        s, k = self.settings, self.step
        self.bank.begin_step(k)
        loss = 0.0
        for part in range(s.accumulation):
            number = k * s.accumulation + part
            slots = range(part * s.batch_size, (part + 1) * s.batch_size)
            loss += self._backward(number, slots)
        self.bank.finish_backward(self._scale)
        norm = self._clip()
        if math.isfinite(norm):
            for group, lr in zip(self.optimizer.param_groups, self._base_lr, strict=True):
                group["lr"] = lr * self._factor(k)
            self._updating = True
            self.optimizer.step()
            self.bank.after_step(self.optimizer)
            self._update_ema()
            self._updating = False
        elif self._scale > 1:
            self._scale = max(1.0, self._scale / 2)
            self._note(f"Step {k + 1}: gradients overflowed, skipped; loss scale now {self._scale:g}")
        else:
            self._fail("The gradient", norm, _TOO_FAST)
        for p in self.bank.parameters.values():
            p.grad = None
        self.losses.append(loss)
        self.step += 1
        if s.save_every and self.step % s.save_every == 0:
            self._save()
        if self.progress is not None:
            lr = self.optimizer.param_groups[0]["lr"]
            self.progress(Progress(self.step, s.steps, loss, norm, lr, time.monotonic() - started))
        self._sample()

    def _sample(self) -> None:
        """Let the host draw, after a step that has samples and if it has not finished those of this step."""
        every = self.settings.sample_every
        if self.sample is None or not every or self.step % every or self._sampled_step == self.step:
            return
        values = self.values()
        with self.bank.evaluation(values):
            self.sample(self.step, values)
        self._sampled_step = self.step

    def _backward(self, number: int, slots: range) -> float:
        """Forward and backward of one batch; returns its share of the step's loss."""
        s = self.settings
        records = self.order.batch(number)
        loaded = self.load(records)
        noised = self.objective.noised(loaded.latents, s.seed, self.step, slots)
        share = self._loss(loaded, noised, records, loaded.mask)
        if self.class_order is not None:
            records = self.class_order.batch(number)
            other = range(_CLASS_SLOTS + slots.start, _CLASS_SLOTS + slots.stop)
            if s.prior == "pictures":
                loaded = self.load(records)
            noised = self.objective.noised(loaded.latents, s.seed, self.step, other)
            target = None
            if s.prior == "match":
                with torch.no_grad(), self.bank.disabled():
                    target = self.predict(noised, records)
            mask = loaded.mask if s.prior == "pictures" else None
            share += self._loss(loaded, noised, records, mask, target, s.prior_weight)
        return share

    def _loss(
        self, loaded: Loaded, noised: Noised, records: list[Record], mask: Tensor | None, target: Tensor | None = None, factor: float = 1.0,
    ) -> float:
        """Weighted sum over the batch divided by the whole step's items, so that accumulation equals one large batch; and its backward."""
        prediction = self.predict(noised, records)
        target = self.objective.target(noised) if target is None else target
        if prediction.shape != target.shape:
            raise TrainingError("The model's prediction has another shape than its target", found=prediction.shape, expected=target.shape)
        weighted = per_sample_error(prediction, target, mask) * self.objective.weight(noised)
        loss = factor * weighted.sum() / (self.settings.batch_size * self.settings.accumulation)
        value = loss.item()
        if not math.isfinite(value):
            self._explain(loaded.latents, noised, records, prediction)
            self._fail("The loss", value, _TOO_FAST)
        (loss * self._scale).backward()
        return value

    def _explain(self, latents: Tensor, noised: Noised, records: list[Record], prediction: Tensor) -> None:
        """Raise for what came before a loss that is not finite, if that is not finite either: pictures, then the model's output."""
        if names := _not_finite(latents, records):
            self._fail(f"The latent of {names}", _values(latents), "Look at the picture, and at the precision of the VAE.")
        if not (names := _not_finite(prediction, records)):
            return
        with torch.no_grad(), self.bank.disabled():
            untrained = self.predict(noised, records)
        if _not_finite(untrained, records):
            self._fail(
                f"The model's output for {names}, also without what was trained,", _values(untrained),
                "Use the model in bfloat16 or float32 if it is in float16, and look for damage in its file and in the patches on it.",
            )
        self._fail(f"The model's output for {names} with what was trained", _values(prediction), _TOO_FAST)

    def _fail(self, what: str, value: object, hint: str) -> None:
        self.bank.abandon_step()
        raise TrainingError(
            f"{what} is not finite in step {self.step + 1}", found=value, expected="finite numbers", hint=hint + self._kept()
        )

    def _clip(self) -> float:
        for p in self._frozen:
            p.grad = None
        trained = [p for g in self.optimizer.param_groups for p in g["params"]]
        return float(nn.utils.clip_grad_norm_(trained, self.settings.clip or math.inf))

    def _update_ema(self) -> None:
        if self.ema is None:
            return
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, p in self.bank.parameters.items():
                self.ema[name].lerp_(p.detach(), 1 - decay)

    # ---------------------------------------------------------------- state

    def fingerprint(self) -> dict[str, object]:
        """Everything that must be equal for a saved state to be continued, as flat plain values."""
        out: dict[str, object] = {}
        for part, (_, selection) in self.bank.parts.items():
            out.update({f"{part}.{k}": v for k, v in selection.config.to_dict().items()})
            out[f"{part}.layers"] = digest([[c.name, c.block, c.count, c.stored] for c in selection.layers])
        out.update({f"settings.{k}": v for k, v in self.settings.fingerprint().items()})
        out.update({f"objective.{k}": v for k, v in self.objective.fingerprint().items()})
        for name, order in (("pictures", self.order), ("class pictures", self.class_order)):
            if order is not None:
                out[name] = digest([[r.name, r.caption, list(r.bucket), r.repeats, r.flip, r.has_mask] for r in order.records])
        out.update(self._extra)
        return out

    def state(self) -> dict[str, object]:
        """All that the next step depends on."""
        return {
            "parameters": self.bank.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema,
            "step": self.step, "losses": self.losses, "notes": self.notes, "loss_scale": self._scale,
        }

    def load_state(self, state: Mapping) -> None:
        """Continue from ``state()`` of an equal run."""
        self.bank.load_state_dict(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema = {n: state["ema"][n].to(p.device, p.dtype, copy=True) for n, p in self.bank.parameters.items()}
        self.step, self.losses, self.notes = state["step"], list(state["losses"]), list(state["notes"])
        self._scale = state["loss_scale"]
        self._saved_step = self.step
        self._sampled_step = 0

    def resume(self) -> bool:
        """Continue from the newest state in ``state_dir``; False if there is none. Raises StateError if it belongs to other settings."""
        found = None if self.state_dir is None else load_latest(self.state_dir, self.fingerprint())
        if found is None:
            return False
        self.load_state(found[1])
        return True

    def _save(self) -> None:
        if self.state_dir is not None and self._saved_step != self.step:
            save_state(self.state_dir, self.step, self.state(), self.fingerprint(), self.settings.keep)
            self._saved_step = self.step

    def _save_if_whole(self) -> None:
        """Save unless the optimizer was interrupted in the middle of its update (then the last state on disk is the good one)."""
        if not self._updating:
            self._save()

    def _kept(self) -> str:
        done = self._saved_step if self._updating else self.step
        return f" The state after {done} steps is kept." if done and self.state_dir is not None else ""

    def _note(self, text: str) -> None:
        self.notes.append(text)

    @staticmethod
    def _free() -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _not_finite(values: Tensor, records: Sequence[Record]) -> str:
    """Names of the records whose part of ``values`` (batch, ...) is not finite, in a line; "" for none."""
    bad = ~values.detach().flatten(1).isfinite().all(1)
    return ", ".join(dict.fromkeys(r.name for r, fault in zip(records, bad.tolist(), strict=True) if fault))


def _values(values: Tensor) -> str:
    """How many numbers are not finite."""
    values = values.detach()
    return f"{int(values.isnan().sum())} NaN and {int(values.isinf().sum())} infinite of {values.numel()} numbers"


@contextmanager
def checkpointing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Gradient checkpointing: activations inside each of ``blocks`` are computed again in the backward pass instead of being kept."""
    before = [(b, b.__dict__.get("forward")) for b in blocks]
    try:
        for block in blocks:
            original = block.forward
            block.__dict__["forward"] = lambda *a, _f=original, **k: checkpoint(_f, *a, use_reentrant=False, **k)
        yield
    finally:
        for block, forward in before:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward
