"""The ways to teach that benchmarks/subject.py compares: ours, LoRA, core's OFT, LyCORIS, and the guide's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from subject_task import PICTURES, SHIFT, Task, World, class_prompts
from torch import Tensor, nn
from train_step import lycoris_method, peft_method

from oft_core.rotation import pack_skew, unpack_skew
from oft_core.training import (
    Loaded,
    Noised,
    Objective,
    OFTConfig,
    Order,
    Record,
    RotationBank,
    Trainer,
    TrainSettings,
)
from oft_core.training.loop import _CLASS_SLOTS as CLASS_SLOTS
from oft_core.training.objective import per_sample_error
from oft_core.training.presets import TRAIN_PRESETS

DECAY = 0.01  # AdamW's, but for our presets: torch's and the trainers' default


def objective(caption_dropout: float = 0.0) -> Objective:
    """What OFT_Train finds for this model: rectified flow, logit-normal levels, SD3's shift."""
    return Objective("flow", sampling="logit_normal", shift=SHIFT, caption_dropout=caption_dropout)


def match_records(task: Task, composed: bool) -> list[Record]:
    """The class prompts that a prior is matched on."""
    texts = class_prompts(task.subject, composed)
    return [Record(f"class {i}", text, (0, 0), role="class") for i, text in enumerate(texts)]


class Ours:
    """The pack's own engine, as OFT_Train uses it."""

    def __init__(
        self,
        world: World,
        task: Task,
        lr: float,
        config: OFTConfig,
        prior: str = "none",
        composed: bool = False,
        caption_dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        """`composed`: of `class_prompts`, to match.   `settings`: more of the engine's TrainSettings."""
        self.world, self.task = world, task
        core = world.network.core
        selection = config.select(core)
        self.layers = [c.name for c in selection.layers]
        self.bank = RotationBank({"unet": (core, selection)}, seed=task.seed)
        latents = {r.name: z for r, z in zip(task.records, task.train, strict=True)}
        class_records = []
        if prior == "match":
            class_records = match_records(task, composed)
        elif prior == "pictures":
            kind = task.subject.kind
            class_records = [Record(f"class {i}", kind, (64, 64), role="class") for i in range(16)]
            noise = torch.randn(16, 16, 8, 8, generator=torch.Generator().manual_seed(task.seed))
            drawn = world.draw([kind] * 16, noise)
            latents |= {r.name: z for r, z in zip(class_records, drawn, strict=True)}
        self.until = 0
        self.trainer = Trainer(
            self.bank,
            TrainSettings(
                steps=1 << 30, batch_size=task.batch, lr=lr, seed=task.seed, prior=prior, **settings
            ),
            objective(caption_dropout),
            task.records,
            load=lambda records: Loaded(torch.stack([latents[r.name] for r in records])),
            predict=self._predict,
            class_records=class_records,
            should_stop=lambda: self.trainer.step >= self.until,
        )

    def _predict(self, noised: Noised, records: list[Record]) -> Tensor:
        texts = ["" if drop else r.caption for drop, r in zip(noised.drop, records, strict=True)]
        return self.world.velocity(noised.x_t, noised.sigma, texts)

    def advance(self, until: int) -> None:
        self.until = until
        self.trainer.run()

    def weights(self, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        with self.bank.installed(), self.bank.evaluation(values):
            return self.world.effective(self.layers)

    def random_weights(self) -> dict[str, Tensor]:
        """Weights turned by the same angles in random planes: every generator q becomes o q o^T, o random
        orthogonal.
        """
        generator = torch.Generator().manual_seed(self.task.seed)
        values = {}
        for name, packed in self.bank.state_dict().items():
            block = int(name.rsplit("/", 1)[1])
            turn = torch.linalg.qr(torch.randn(len(packed), block, block, generator=generator)).Q
            values[name] = pack_skew(turn @ unpack_skew(packed, block) @ turn.transpose(-1, -2))
        return self.weights(values)

    def facts(self) -> dict[str, float]:
        """Largest error of R^T R = I; the largest and the root mean square angle of all planes, degrees."""
        pieces = [p.op for ops in self.bank.adapter_tensors().values() for p in ops]
        angles = torch.cat([op.angles().flatten() for op in pieces]).abs().rad2deg()
        return {
            "orthogonality": max(op.orthogonality_error() for op in pieces),
            "angle_max": angles.max().item(),
            "angle_rms": angles.square().mean().sqrt().item(),
        }


class Rival:
    """Another package's adapter, trained with the same order, noise, levels, optimizer and gradient norm."""

    def __init__(
        self,
        world: World,
        task: Task,
        lr: float,
        method: Any,
        match: bool = False,
        composed: bool = False,
        weight_decay: float = DECAY,
    ) -> None:
        """`match`: prior preservation as our engine does it: the frozen model's answers to `class_prompts`."""
        self.world, self.task, self.method = world, task, method
        records = match_records(task, composed)
        self.class_order = Order(records, task.batch, task.seed + 1) if match else None
        self.clip = TrainSettings().clip
        self.optimizer = torch.optim.AdamW(method.parameters, lr=lr, weight_decay=weight_decay)
        self.objective = objective()
        self.order = Order(task.records, task.batch, task.seed)
        self.step = 0

    def advance(self, until: int) -> None:
        while self.step < until:
            records = self.order.batch(self.step)
            latents = torch.stack([self.task.train[int(r.name)] for r in records])
            slots = range(len(records))
            parts = [(self.objective.noised(latents, self.task.seed, self.step, slots), records, None)]
            if self.class_order is not None:
                match = self.class_order.batch(self.step)
                slots = range(CLASS_SLOTS, CLASS_SLOTS + len(records))
                noised = self.objective.noised(latents, self.task.seed, self.step, slots)
                with torch.no_grad():
                    target = self.world.velocity(noised.x_t, noised.sigma, [r.caption for r in match])
                parts.append((noised, match, target))
            with self.method.install():
                for noised, some, target in parts:
                    answer = self.world.velocity(noised.x_t, noised.sigma, [r.caption for r in some])
                    target = self.objective.target(noised) if target is None else target
                    per_sample_error(answer, target).mean().backward()
            nn.utils.clip_grad_norm_(self.method.parameters, self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1

    def weights(self) -> dict[str, Tensor]:
        with self.method.install():
            return self.world.effective()

    def facts(self) -> dict[str, float]:
        return {}


def _lora(
    rank: int, match: bool = False, target: str = "attention", **more: Any
) -> Callable[[World, Task, float], Rival]:
    def make(world: World, task: Task, lr: float) -> Rival:
        from peft import LoraConfig

        torch.manual_seed(task.seed)
        layers = world.choose(target)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
        method = peft_method(_subject(world, layers), f"LoRA {rank}", config)
        return Rival(world, task, lr, method, match, **more)

    return make


def _core(world: World, task: Task, lr: float) -> Rival:
    """ComfyUI's own trainable OFT, applied to the weight as its training node does; rank 16, alpha 1 (the
    node's).
    """
    from comfy.weight_adapter import OFTAdapter

    layers = {n: world.network.core.get_submodule(n) for n in world.layers}
    made = {
        n: OFTAdapter.create_train(layer.weight, rank=16, alpha=1.0).train() for n, layer in layers.items()
    }

    @contextmanager
    def install() -> Iterator[None]:
        for name, layer in layers.items():
            layer.__dict__["forward"] = lambda x, a=layer, f=made[name]: F.linear(x, f(a.weight), a.bias)
        try:
            yield
        finally:
            for layer in layers.values():
                del layer.__dict__["forward"]

    parameters = [m.oft_blocks for m in made.values()]
    return Rival(world, task, lr, SimpleNamespace(parameters=parameters, install=install))


def _subject(world: World, layers: list[str]) -> SimpleNamespace:
    """The world's network as the benchmark of training steps knows a model."""
    core = world.network.core
    return SimpleNamespace(model=core, targets=layers, device=next(core.parameters()).device)


def _lycoris(world: World, task: Task, lr: float) -> Rival:
    return Rival(world, task, lr, lycoris_method(_subject(world, world.layers), 16))


def _ours(
    prior: str = "none",
    composed: bool = False,
    caption_dropout: float = 0.0,
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> Callable[[World, Task, float], Ours]:
    def make(world: World, task: Task, lr: float) -> Ours:
        more = settings or {}
        return Ours(world, task, lr, OFTConfig(**config), prior, composed, caption_dropout, **more)

    return make


def preset_method(
    name: str, prior: str | None = None, settings: dict[str, Any] | None = None, **config: Any
) -> Callable[[World, Task, float], Ours]:
    """As Train OFT does with one of its presets and a class prompt.   prior, settings, config: what is changed."""
    preset = TRAIN_PRESETS[name]
    config = {"target_modules": preset["target"], "module_dropout": preset["module_dropout"], **config}
    settings = {"weight_decay": preset["weight_decay"], **(settings or {})}
    return _ours(prior or preset["prior"], False, preset["caption_dropout"], settings, **config)


@dataclass(frozen=True)
class Method:
    """label: in tables.   make: (world, task, learning rate) -> learner.   grid: learning rates to try, or the
    name of the method whose learning rate is taken.
    """

    label: str
    make: Callable[[World, Task, float], Ours | Rival]
    grid: tuple[float, ...] | str


RATE, BLOCK = 1e-3, 32  # as Train OFT comes
TEXT_LAYERS = "text-attention"
OFT_RATES, LORA_RATES, WEIGHT_RATES = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3), (1e-4, 3e-4, 1e-3)
METHODS: dict[str, Method] = {
    "oft32": Method("OFT b32 (ours)", _ours(oft_block_size=32), OFT_RATES),
    "oft16": Method("OFT b16 (ours)", _ours(oft_block_size=16), OFT_RATES),
    "coft": Method("OFT b32, 15° cap (ours)", _ours(oft_block_size=32, angle_cap=15.0), OFT_RATES),
    "oft32-match": Method("OFT b32 + prior match (ours)", _ours("match", oft_block_size=32), OFT_RATES),
    "oft32-pictures": Method(
        "OFT b32 + prior pictures (ours)", _ours("pictures", oft_block_size=32), OFT_RATES
    ),
    "subject": Method("OFT b32, preset subject (ours)", preset_method("subject", oft_block_size=32), OFT_RATES),
    "default": Method("Train OFT as it comes (ours)", preset_method("subject", oft_block_size=32), (RATE,)),
    "subject-text": Method(
        "OFT b32, preset subject, text attention (ours)",
        preset_method("subject", oft_block_size=32, target_modules=TEXT_LAYERS),
        OFT_RATES,
    ),
    "lora4": Method("LoRA rank 4 (PEFT)", _lora(4), LORA_RATES),
    "lora16": Method("LoRA rank 16 (PEFT)", _lora(16), LORA_RATES),
    "lora16-match": Method("LoRA rank 16 + prior match", _lora(16, match=True), LORA_RATES),
    "lora16-text": Method(
        "LoRA rank 16 + prior match, text attention", _lora(16, match=True, target=TEXT_LAYERS), LORA_RATES
    ),
    "lora16-decay": Method(
        "LoRA rank 16 + prior match, the preset's decay",
        _lora(16, match=True, weight_decay=TRAIN_PRESETS["subject"]["weight_decay"]),
        "lora16-match",
    ),
    "core": Method("OFT (ComfyUI core)", _core, WEIGHT_RATES),
    "lycoris": Method("Diag-OFT (LyCORIS)", _lycoris, WEIGHT_RATES),
}
# A method that is another one at a rate of its own: the same runs, number for number.
TWINS = {"default": "subject"}
CONTROL = "oft32"  # the method whose rotations are also tried with random planes

# The settings of docs/training.md: Train OFT's defaults, and one thing changed at a time.
GUIDE_STEPS = (100, 200, 400, 800)
GUIDE_PICTURES = (10, 20)  # beside PICTURES, with the defaults


def _guide(lr: float = RATE, preset: str = "subject", **changed: Any) -> Method:
    return Method("", preset_method(preset, **{"oft_block_size": BLOCK, **changed}), (lr,))


def _weighted(weight: float) -> Method:
    return _guide(prior="match" if weight else "none", settings={"prior_weight": weight})


GUIDE: dict[str, Method] = {
    "guide": _guide(),
    "guide-lr0.003": _guide(lr=3e-3),
    "guide-weight0": _weighted(0),
    "guide-weight3": _weighted(3.0),
    "guide-block8": _guide(oft_block_size=8),
    "guide-block64": _guide(oft_block_size=64),
    "guide-block192": _guide(oft_block_size=192),
    "guide-decay0.01": _guide(settings={"weight_decay": DECAY}),
    "guide-decay3": _guide(settings={"weight_decay": 3.0}),
    "guide-dropout0": _guide(module_dropout=0.0),
    "guide-cap10": _guide(angle_cap=10.0),
    "guide-cap5": _guide(angle_cap=5.0),
    "guide-eps0.3": _guide(coft=True, eps=0.3),
    "guide-eps0.1": _guide(coft=True, eps=0.1),
    "guide-text": _guide(target_modules=TEXT_LAYERS),
    "guide-style": _guide(preset="style"),
    "guide-fast": _guide(preset="fast"),
}
# Table of docs/training.md -> head of its first column, and its rows: what is said there, variant, pictures.
GUIDE_TABLES: dict[str, tuple[str, list[tuple[str, str, int]]]] = {
    "pictures": ("pictures", [(str(n), "guide", n) for n in (PICTURES, *GUIDE_PICTURES)]),
    "rate": ("learning rate", [("0.001 (default)", "guide", PICTURES), ("0.003", "guide-lr0.003", PICTURES)]),
    "prior": (
        "prior weight",
        [
            ("0 (none)", "guide-weight0", PICTURES),
            ("1 (default)", "guide", PICTURES),
            ("3", "guide-weight3", PICTURES),
        ],
    ),
    "block": (
        "block size",
        [
            ("8", "guide-block8", PICTURES),
            ("32 (default)", "guide", PICTURES),
            ("64", "guide-block64", PICTURES),
            ("192 (a whole layer)", "guide-block192", PICTURES),
        ],
    ),
    "decay": (
        "decay and dropout",
        [
            ("`weight_decay` 1, `module_dropout` 0.2 (default)", "guide", PICTURES),
            ("`weight_decay` 0.01", "guide-decay0.01", PICTURES),
            ("`weight_decay` 3", "guide-decay3", PICTURES),
            ("`module_dropout` 0", "guide-dropout0", PICTURES),
        ],
    ),
    "limit": (
        "limit",
        [
            ("60° (default)", "guide", PICTURES),
            ("`angle` 10", "guide-cap10", PICTURES),
            ("`angle` 5", "guide-cap5", PICTURES),
            ("`eps` 0.3", "guide-eps0.3", PICTURES),
            ("`eps` 0.1", "guide-eps0.1", PICTURES),
        ],
    ),
    "preset": (
        "preset",
        [
            *((f"`{n}`", "guide" if n == "subject" else f"guide-{n}", PICTURES) for n in TRAIN_PRESETS),
            (f"`subject`, `{TEXT_LAYERS}`", "guide-text", PICTURES),
        ],
    ),
}


def method_of(name: str) -> Method:
    return METHODS[name] if name in METHODS else GUIDE[name]
