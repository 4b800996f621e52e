"""What benchmarks/subject.py measures on pictures: an encoder that takes no part in the training, colours
and places.

The encoder is a small convolutional network that learns to tell apart the concepts of the embedded model's
training pictures (WORK/pictures.npy of ``python -m embedded.make.pictures``). It never sees the held-out
subjects; how well it knows them again is measured by `retrieval` and printed with every report.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedded.captions import COLOURS, PLACES, SMALL, WHITE, Concept, concepts
from embedded.pictures import HELD_VIEWS, TRAIN_VIEWS, subjects, views

EMBEDDING = 128
STEPS, BATCH = 900, 96
SCALE = 14.0  # of the cosines before the softmax
TEMPLATES = 12  # pictures behind a known concept's mean embedding


def as_tensor(pictures: list[np.ndarray] | np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in 0..1."""
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).float().div(255).contiguous()


class Encoder(nn.Module):
    """RGB in 0..1 [B, 3, 64, 64] -> unit vectors [B, 128]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, 32, 64, 96, 128, 192)
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [
                nn.Conv2d(a, b, 3, stride=1 if i == 3 else 2, padding=1),
                nn.GroupNorm(8, b),
                nn.GELU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 16, EMBEDDING)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.body(x - 0.5).flatten(1)), dim=1)


def varied(x: Tensor, generator: torch.Generator) -> Tensor:
    """Augmented copies of pictures [B, 3, 64, 64]: turned, scaled, moved, mirrored, other light, blur and
    noise.
    """

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=generator)

    angle, zoom = draw(-0.2, 0.2), draw(0.85, 1.45)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    move = draw(-0.22, 0.22, 2)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    turn = torch.stack(
        [torch.stack([cos * mirror, -sin, move[:, 0]], 1), torch.stack([sin * mirror, cos, move[:, 1]], 1)], 1
    )
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    y = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    y = (y - 0.5) * draw(0.8, 1.2, 1, 1, 1) + 0.5 + draw(-0.07, 0.07, 3, 1, 1)
    # Generated pictures are softer than drawn ones: sharpness must not tell concepts apart.
    soft = F.avg_pool2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), 3, 1)
    softer = F.interpolate(F.avg_pool2d(y, 2), scale_factor=2, mode="bilinear")
    kind = draw(0, 1, 1, 1, 1)
    y = torch.where(kind < 0.3, y, torch.where(kind < 0.65, soft, softer))
    return (y + draw(0, 0.05, 1, 1, 1) * torch.randn(y.shape, generator=generator)).clamp(0, 1)


def train_encoder(
    pictures: np.ndarray, labels: np.ndarray, *, steps: int = STEPS, batch: int = BATCH
) -> Encoder:
    """The encoder from pictures (uint8 [N, 64, 64, 3]) of one thing each and its number (int [N]). Seeded."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    encoder, classes = Encoder(), int(labels.max()) + 1
    centres = nn.Parameter(F.normalize(torch.randn(classes, EMBEDDING, generator=generator), dim=1))
    optimizer = torch.optim.AdamW([*encoder.parameters(), centres], lr=2e-3, weight_decay=0.02)
    begun = time.time()
    for step in range(steps):
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        x = varied(as_tensor(pictures[chosen.numpy()]), generator)
        with torch.autocast("cpu", torch.bfloat16):
            found = encoder(x.contiguous(memory_format=torch.channels_last))
        cosines = found.float() @ F.normalize(centres, dim=1).T
        target = torch.from_numpy(labels[chosen.numpy()])
        loss = F.cross_entropy(SCALE * (cosines - 0.15 * F.one_hot(target, classes)), target)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 30) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(
                f"encoder: step {step + 1}, loss {loss.item():.3f}, {time.time() - begun:.0f} s", flush=True
            )
    return encoder.eval().requires_grad_(False)


@dataclass
class Known:
    """The encoder and a mean embedding for every concept: `names` [n], unit vectors `templates` [n, 128]."""

    encoder: Encoder
    names: list[str]
    templates: Tensor

    @property
    def digest(self) -> str:
        """First 8 digits of the SHA-256 of the templates: what one encoder measured is not compared with another's."""
        return hashlib.sha256(self.templates.contiguous().numpy().tobytes()).hexdigest()[:8]

    def embed(self, pictures: Tensor) -> Tensor:
        """[N, 3, 64, 64] in 0..1 -> unit vectors [N, 128]."""
        with torch.no_grad():
            return self.encoder(pictures)

    def nearest(self, embedded: Tensor) -> list[str]:
        """The name of the concept whose template is nearest to each vector [N, 128]."""
        return [self.names[i] for i in (embedded @ self.templates.T).argmax(1).tolist()]


def _training_set(work: Path) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Pictures of one known thing each, its number, its caption, and the names; needs stage 1 of
    embedded/make.
    """
    listed = json.loads((work / "captions.json").read_text("utf-8"))
    index = np.array([i for _, i in listed["captions"]])
    texts = [text for text, _ in listed["captions"]]
    keep = np.flatnonzero(index >= 0)
    pictures = np.load(work / "pictures.npy", mmap_mode="r")
    if len(pictures) != len(index):
        raise ValueError(
            f"{work / 'pictures.npy'}: {len(pictures)} pictures, expected {len(index)} as captions.json has"
        )
    return pictures[keep], index[keep], [texts[i] for i in keep], listed["names"]


def known(work: Path, folder: Path) -> Known:
    """The encoder with templates of all concepts, trained on first use and kept in
    `folder`/encoder.safetensors.
    """
    path = folder / "encoder.safetensors"
    held = subjects()
    names = [c.name for c in concepts() if not c.held]
    if not path.is_file():
        pictures, labels, texts, names = _training_set(work)
        encoder = train_encoder(pictures, labels)
        templates = torch.zeros(len(names), EMBEDDING)
        for i in range(len(names)):
            mine = np.flatnonzero(labels == i)
            plain = [n for n in mine if texts[n] == names[i]][:TEMPLATES:3]
            other = [n for n in mine if texts[n] != names[i]][: TEMPLATES - len(plain)]
            with torch.no_grad():
                templates[i] = encoder(as_tensor(pictures[plain + other])).mean(0)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({**encoder.state_dict(), "templates": templates}, f"{path}.part")
        os.replace(f"{path}.part", path)
    tensors = load_file(path)
    templates = tensors.pop("templates")
    encoder = Encoder()
    encoder.load_state_dict(tensors)
    encoder.eval().requires_grad_(False)
    with torch.no_grad():
        mine = torch.stack([encoder(as_tensor(views(s, HELD_VIEWS))).mean(0) for s in held])
    return Known(encoder, names + [s.name for s in held], F.normalize(torch.cat([templates, mine]), dim=1))


def retrieval(space: Known) -> tuple[float, float]:
    """Does it know again what it never saw? Each of the subjects' training views among all concepts'
    templates.

    Returns (share whose nearest template, of all concepts, is the subject's; mean similarity to the own
    held-out views minus the mean of the best other subject's).
    """
    right, margins = [], []
    held = subjects()
    templates = {s.name: space.embed(as_tensor(views(s, HELD_VIEWS))) for s in held}
    for s in held:
        found = space.embed(as_tensor(views(s, TRAIN_VIEWS)))
        right += [name == s.name for name in space.nearest(found)]
        means = {name: (found @ t.T).mean().item() for name, t in templates.items()}
        margins.append(means.pop(s.name) - max(means.values()))
    return float(np.mean(right)), float(np.mean(margins))


# ---------------------------------------------------------------- what a prompt asks for

_PAINTS = {**COLOURS, "white": WHITE}
_TABLE = torch.tensor(list(_PAINTS.values())).float() / 255


def _corners(pictures: Tensor, side: int = 7) -> Tensor:
    """The pixels of the four corners, [N, 4, 3, side * side]."""
    rows = (slice(0, side), slice(-side, None))
    return torch.stack([pictures[:, :, r, c].flatten(2) for r in rows for c in rows], 1)


def backgrounds(pictures: Tensor) -> list[str]:
    """The colour of each picture's background: the name nearest to most of its four corners."""
    nearest = (_corners(pictures).mean(-1)[:, :, None] - _TABLE).norm(dim=-1).argmin(-1)
    distance = (_corners(pictures).mean(-1)[:, :, None] - _TABLE).norm(dim=-1).amin(-1)
    out = []
    for row, far in zip(nearest, distance, strict=True):
        counts = torch.bincount(row, minlength=len(_TABLE)).float()
        # Of equally frequent colours the one that fits better.
        fit = torch.zeros(len(_TABLE)).index_add_(0, row, 0.1 / (1 + far))
        out.append(list(_PAINTS)[int((counts + fit).argmax())])
    return out


def places(pictures: Tensor) -> list[str]:
    """Where the thing is in each picture: a key of PLACES, "whole" if it is large, "none" if nothing is."""
    names = backgrounds(pictures)
    out = []
    for picture, name in zip(pictures, names, strict=True):
        corners = _corners(picture[None])[0]
        paint = _TABLE[list(_PAINTS).index(name)]
        means = corners.mean(-1)
        ground = means[(means - paint).norm(dim=1).argmin()]
        there = (picture - ground[:, None, None]).abs().amax(0) > 0.18
        rows, columns = (there.float().mean(i) for i in (1, 0))
        # Stray pixels do not count: a row or column must be covered for 4 px.
        y, x = (torch.nonzero(v > 4 / 64).flatten() for v in (rows, columns))
        if len(y) == 0 or len(x) == 0:
            out.append("none")
            continue
        height, width = int(y[-1] - y[0]) + 1, int(x[-1] - x[0]) + 1
        if max(height, width) > SMALL + 8:
            out.append("whole")
            continue
        centre = ((x[0] + x[-1]).item() / 2, (y[0] + y[-1]).item() / 2)
        far = {
            k: math.dist(centre, (a + SMALL / 2 - 0.5, b + SMALL / 2 - 0.5)) for k, (a, b) in PLACES.items()
        }
        out.append(min(far, key=far.get))
    return out


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """Root mean squared difference of pictures [N, 3, H, W] in 0..1: [N]."""
    return (a - b).square().flatten(1).mean(1).sqrt()


def spread(pictures: Tensor) -> float:
    """Mean RMSE between all pairs of pictures [N, 3, H, W]."""
    i, j = torch.triu_indices(len(pictures), len(pictures), 1)
    return rmse(pictures[i], pictures[j]).mean().item()


def similarity(space: Known, pictures: Tensor, subject: Concept) -> float:
    """Mean cosine between the embeddings of pictures and of the subject's held-out views, over all pairs."""
    return (space.embed(pictures) @ space.embed(as_tensor(views(subject, HELD_VIEWS))).T).mean().item()
