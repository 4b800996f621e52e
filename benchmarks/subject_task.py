"""What benchmarks/subject.py teaches, and to whom: the subjects' pictures and captions, and the embedded model."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import subject_metrics as metrics
import torch
from torch import Tensor

from embedded.autoencoder import decoder, encoder
from embedded.captions import COLOURS, PLACES, Concept, caption, concepts
from embedded.make.transformer import Captions, Network, host_class
from embedded.pictures import TRAIN_VIEWS, prompt, subjects, views
from oft_core.training import OFTConfig, Record
from oft_core.training.objective import shifted

SHIFT = 3.0  # of SD3's noise levels, in training as in drawing
BATCH = 1  # as OFT_Train has it
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
