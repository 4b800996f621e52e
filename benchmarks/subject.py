"""Does it teach, and what does it cost? Unseen subjects, taught to the embedded model by several methods.

    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject.py WORK --grid        learning rates, on other subjects
    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject.py WORK --minutes 60  the runs; goes on where it stopped
    OFT_HOST_DIR=<ComfyUI> python benchmarks/subject.py WORK --every-rate 6 --methods subject lora16-match
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
import hashlib
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import subject_metrics as metrics
from train_step import lycoris_method, peft_method

from embedded import model as shipped
from embedded.autoencoder import decoder, encoder
from embedded.captions import COLOURS, PLACES, Concept, caption, concepts
from embedded.make.transformer import Captions, Network, host_class
from embedded.pictures import TRAIN_VIEWS, cutout, prompt, subjects, view, views
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
from oft_core.training.objective import per_sample_error, shifted
from oft_core.training.presets import TRAIN_PRESETS

SHIFT = 3.0  # of SD3's noise levels, in training as in drawing
GRID_SUBJECTS = ("castle", "owl", "guitar")  # for choosing learning rates; never reported
GRID_STEPS = (50, 100, 200, 400)
SUBJECTS = 12  # behind the reported numbers
# Dense where most methods learn: fidelity rises from a fifth to four fifths within 30 steps, so that a line between
# distant checkpoints would say little about what is reached at a level between them.
STEPS = (10, 15, 20, 25, 35, 50, 75, 100, 200, 400)
LONG_STEPS = (*STEPS, 1000, 2000)
BATCH = 1  # as OFT_Train has it
DECAY = 0.01  # AdamW's, but for our presets: torch's and the trainers' default
PICTURES = len(TRAIN_VIEWS)
DRAW_STEPS, CFG = 10, 3.0
FORWARDS = 128  # sequences in one forward while drawing


def task_texts(subject: Concept) -> dict[str, list[str]]:
    """What is drawn at every checkpoint, by purpose; 34 captions.

    subject: trigger and class, from six noises.   class: the class word alone.   other: things that the
    model knows, four of them of the same class.   follow: trigger and class with backgrounds and places
    that the training never showed.
    """
    rng = random.Random(subject.name)
    known = [c for c in concepts() if not c.held]
    near = rng.sample([c for c in known if c.kind == subject.kind], 4)
    far = rng.sample([c for c in known if c.kind != subject.kind], 8)
    others = [c.name for c in near + far[:4]]
    others += [
        caption(c.name, colour) for c, colour in zip(far[4:6], rng.sample(sorted(COLOURS), 2), strict=True)
    ]
    others += [
        caption(c.name, None, place) for c, place in zip(far[6:], rng.sample(sorted(PLACES), 2), strict=True)
    ]
    own = prompt(subject)
    follow = [caption(own, colour) for colour in ("blue", "yellow", "green", "pink")]
    follow += [caption(own, None, place) for place in ("left", "right", "top", "bottom")]
    pairs = (("red", "left"), ("blue", "right"), ("purple", "top"), ("yellow", "bottom"))
    follow += [caption(own, colour, place) for colour, place in pairs]
    return {"subject": [own] * 6, "class": [subject.kind] * 4, "other": others, "follow": follow}


def view_captions(subject: Concept, kinds: Iterable[tuple[int, int, int, bool]]) -> list[str]:
    """What is said of views (size, x, y, mirrored): trigger and class, and whether it is mirrored."""
    return [caption(prompt(subject), mirrored=mirrored) for *_, mirrored in kinds]


def class_prompts(subject: Concept, composed: bool = False) -> list[str]:
    """What a prior is matched on: the class word; `composed`: also with every background and place, and both."""
    kind, colours, places = subject.kind, sorted(COLOURS), sorted(PLACES)
    if not composed:
        return [kind]
    both = zip(colours, itertools.cycle(places), strict=False)
    return [
        kind,
        *(caption(kind, colour) for colour in colours),
        *(caption(kind, None, place) for place in places),
        *(caption(kind, colour, place) for colour, place in both),
    ]


def asked(text: str) -> tuple[str, str, str]:
    """A caption's (name, background, place): "red apple", "white", "whole" where nothing else is said."""
    text, _, place = text.partition(", ")
    name, _, rest = text.partition(" on a ")
    return name.removeprefix("small ") if place else name, rest.split(" ")[0] or "white", place or "whole"


# ---------------------------------------------------------------- the frozen model


class World:
    """The embedded model with short contexts, its autoencoder and captions. Everything float32 on the CPU."""

    def __init__(
        self, transformer: dict[str, Tensor], autoencoder: dict[str, Tensor], more: Iterable[str] = ()
    ) -> None:
        depth = 1 + max(int(name.split(".")[1]) for name in transformer if name.startswith("joint_blocks."))
        self.network = Network(host_class(), depth)
        self.network.core.load_state_dict({k: v.float() for k, v in transformer.items()})
        self.network.requires_grad_(False).eval()
        sums = hashlib.sha256(
            b"".join(v.float().contiguous().numpy().tobytes() for _, v in sorted(transformer.items()))
        )
        self.digest = sums.hexdigest()[:8]
        self.parts = {"taesd_encoder": encoder(), "taesd_decoder": decoder()}
        for name, part in self.parts.items():
            own = {k[len(name) + 1 :]: v.float() for k, v in autoencoder.items() if k.startswith(name)}
            part.load_state_dict(own)
            part.requires_grad_(False).eval()
        texts = {t for s in subjects() for part in task_texts(s).values() for t in part}
        texts |= {t for s in subjects() for t in class_prompts(s, composed=True)}
        texts |= {t for s in subjects() for t in view_captions(s, metrics.HELD_VIEWS)}
        texts = sorted(texts | {c.name for c in concepts()} | set(more))
        self.number = {"": 0, **{text: i + 1 for i, text in enumerate(texts)}}
        self.captions = Captions(texts)
        self.layers = self.choose("attention")

    def encode(self, pictures: Tensor) -> Tensor:
        """[N, 3, 64, 64] in 0..1 -> latents [N, 16, 8, 8]."""
        with torch.no_grad():
            return self.parts["taesd_encoder"](pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, 16, 8, 8] -> [N, 3, 64, 64] in 0..1; bfloat16 products, the same for all methods."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = [self.parts["taesd_decoder"](part) for part in latents.split(16)]
        return torch.cat(out).float().clamp(0, 1)

    def velocity(self, x: Tensor, sigma: Tensor, texts: list[str]) -> Tensor:
        """What the model predicts (noise minus latents) for noised latents [B, 16, 8, 8], sigma [B], one text
        each.
        """
        return self.network(x, sigma, *self.captions.batch(torch.tensor([self.number[t] for t in texts])))

    def _each(self, x: Tensor, sigma: float, texts: list[str]) -> Tensor:
        """As `velocity`, with captions of like length together, so that little is filled up."""
        number = torch.tensor([self.number[t] for t in texts])
        width = (self.captions.length[number] + 3) // 4
        out = torch.empty_like(x)
        for length in width.unique():
            for part in torch.nonzero(width == length).flatten().split(FORWARDS):
                level = torch.full((len(part),), sigma)
                out[part] = self.network(x[part], level, *self.captions.batch(number[part]))
        return out

    def draw(self, texts: list[str], noise: Tensor, steps: int = DRAW_STEPS, cfg: float = CFG) -> Tensor:
        """Latents [N, 16, 8, 8] of texts from noise of that shape: Euler's method, SD3's levels."""
        sigmas = shifted(torch.linspace(1, 0, steps + 1), SHIFT).tolist()
        x, count = noise.clone(), len(texts)
        with torch.no_grad():
            for now, then in itertools.pairwise(sigmas):
                both = self._each(torch.cat([x, x]), now, [*texts, *[""] * count])
                x = x + (then - now) * (both[count:] + cfg * (both[:count] - both[count:]))
        return x

    @contextmanager
    def carrying(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """The model with other weights of some layers inside (layer name -> weight)."""
        before = {n: self.network.core.get_submodule(n).weight.data for n in weights}
        try:
            for name, weight in weights.items():
                self.network.core.get_submodule(name).weight.data = weight
            yield
        finally:
            for name, weight in before.items():
                self.network.core.get_submodule(name).weight.data = weight

    def choose(self, target: str) -> list[str]:
        """Names of the layers that one of the engine's presets means."""
        return [c.name for c in OFTConfig(target_modules=target).select(self.network.core).layers]

    def effective(self, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The layers' weights as their forwards act now (answers to unit vectors, no bias); of the attention
        if not told otherwise.
        """
        out = {}
        with torch.no_grad():
            for name in self.layers if layers is None else layers:
                layer = self.network.core.get_submodule(name)
                unit = torch.eye(layer.in_features)
                out[name] = (layer(unit) - layer(torch.zeros(1, layer.in_features))).T.contiguous()
        return out


def training_views(count: int) -> tuple[tuple[int, int, int, bool], ...]:
    """The five training views, and more of other sizes and places (never the held-out ones) up to `count`."""
    rng, out = random.Random(5), list(TRAIN_VIEWS)
    while len(out) < count:
        size = rng.randrange(44, 65, 2)
        view = (size, rng.randint(0, 64 - size), rng.randint(0, 64 - size), rng.random() < 0.5)
        if view not in out and view not in metrics.HELD_VIEWS:
            out.append(view)
    return tuple(out[:count])


@dataclass
class Task:
    """One subject to teach: latents of its training views and of the held-out ones, [N, 16, 8, 8] each."""

    subject: Concept
    train: Tensor
    held: Tensor
    seed: int
    batch: int = BATCH
    records: list[Record] = field(init=False)

    def __post_init__(self) -> None:
        texts = view_captions(self.subject, training_views(len(self.train)))
        self.records = [Record(str(i), text, (64, 64)) for i, text in enumerate(texts)]

    @classmethod
    def of(
        cls, world: World, subject: Concept, seed: int, batch: int = BATCH, pictures: int = PICTURES
    ) -> Task:
        kinds = (training_views(pictures), metrics.HELD_VIEWS)
        train, held = (world.encode(metrics.as_tensor(views(subject, kind))) for kind in kinds)
        return cls(subject, train, held, seed, batch)


def objective(caption_dropout: float = 0.0) -> Objective:
    """What OFT_Train finds for this model: rectified flow, logit-normal levels, SD3's shift."""
    return Objective("flow", sampling="logit_normal", shift=SHIFT, caption_dropout=caption_dropout)


def match_records(task: Task, composed: bool) -> list[Record]:
    """The class prompts that a prior is matched on."""
    texts = class_prompts(task.subject, composed)
    return [Record(f"class {i}", text, (0, 0), role="class") for i, text in enumerate(texts)]


# ---------------------------------------------------------------- methods


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
        method = peft_method(SimpleNamespace(model=world.network.core, targets=layers), f"LoRA {rank}", config)
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


def _lycoris(world: World, task: Task, lr: float) -> Rival:
    return Rival(
        world, task, lr, lycoris_method(SimpleNamespace(model=world.network.core, targets=world.layers), 16)
    )


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
    """label: in tables.   make: (world, task, learning rate) -> learner.   grid: learning rates to try, or
    the name of
    the method whose learning rate is taken."""

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

    Every third subject has long runs, until there are `long` of them.
    """
    out = []
    for seed in seeds:
        for i, s in enumerate(reported_subjects()[:count]):
            steps = LONG_STEPS if i % 3 == 2 and i // 3 < long else STEPS
            out += [Job("main", m, rates[m], s.name, seed, steps, **more) for m in methods]
    return out


def rate_jobs(methods: Iterable[str], count: int, batch: int) -> list[Job]:
    """Every learning rate of the methods on the first reported subjects: nothing is chosen by these."""
    tried = [(m, lr) for m in methods if not isinstance(METHODS[m].grid, str) for lr in METHODS[m].grid]
    names = [s.name for s in reported_subjects()[:count]]
    return [Job("rates", m, lr, s, 0, STEPS, batch) for s in names for m, lr in tried]


def guide_jobs(count: int) -> list[Job]:
    """All settings of the guide for its first subject, then for the next; none is a subject of the evaluation."""
    names = [s.name for s in reported_subjects()[SUBJECTS:]]
    variants = [(m, PICTURES) for m in GUIDE] + [("guide", n) for n in GUIDE_PICTURES]
    return [
        Job("guide", m, GUIDE[m].grid[0], s, 0, GUIDE_STEPS, BATCH, n) for s in names[:count] for m, n in variants
    ]


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


def sheet_name(stage: str, subject: str, seed: int, method: str, lr: float, pictures: int) -> str:
    """File of a run's pictures: a row for the frozen model and for every checkpoint, 34 columns of 64 px."""
    return f"{stage}-{subject}-{seed}-{method}-{lr:g}-{pictures}.png"


def _save_sheet(path: Path, rows: list[Tensor]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    Image.fromarray((whole * 255).round().byte().permute(1, 2, 0).numpy()).save(path, optimize=True)


def finished(lines: Iterable[dict[str, Any]]) -> dict[tuple, int]:
    """Key of a run -> how many steps it had."""
    out: dict[tuple, int] = {}
    for line in lines:
        out[key_of(line)] = max(line["rows"][-1]["step"], out.get(key_of(line), 0))
    return out


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
    parser.add_argument("--long", type=int, default=4, help="how many subjects have runs of 2,000 steps")
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
        from subject_report import write

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
        stage, jobs = "rates", rate_jobs(options.methods, options.every_rate, options.batch)
    elif options.guide:
        stage, jobs = "guide", guide_jobs(options.guide_subjects)
    else:
        stage, mine = "main", [x for x in lines if x["batch"] == options.batch]
        given = {name: float(rate) for name, rate in (text.split("=") for text in options.rates)}
        rates = given | chosen_rates(mine, [m for m in options.methods if m not in given])
        print("learning rates: " + ", ".join(f"{m} {rates[m]:g}" for m in options.methods))
        more = {"batch": options.batch, "pictures": options.pictures}
        jobs = main_jobs(options.methods, rates, options.subjects, options.seeds, options.long, **more)
    alike = (stage, "main") if stage == "rates" else (stage,)  # one of the rates is the chosen one
    done = finished(x for x in lines if x["stage"] in alike)
    judges: dict[tuple, Judge] = {}
    sheets = folder / "sheets"
    known = {key_of(x): x for x in lines if x["stage"] == stage}

    def run_one(job: Job) -> dict[str, Any]:
        return run(job, world, space, judges, sheets, known.get(job.key))

    left = work_through(jobs, done, options.minutes, run_one, results)
    print(f"{left} of {len(jobs)} runs are left" if left else f"all {len(jobs)} runs are there")


if __name__ == "__main__":
    main()
