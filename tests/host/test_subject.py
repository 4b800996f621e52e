"""Does training teach? One subject that the tiny model never saw, in the real host.

The bounds beside this file were measured by benchmarks/subject_bounds.py, which also says what they mean.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dev.client import Client
from dev.server import ComfyServer
from dev.subjects import (
    SMOKE,
    drawn,
    drift,
    likeness,
    other_prompts,
    provide_checkpoint,
    random_like,
    subject,
    subject_prompts,
    train,
)
from embedded.captions import caption, concepts

BOUNDS = json.loads(Path(__file__).with_name("subject_bounds.json").read_text("utf-8"))
SUBJECT = subject("koala")


@pytest.fixture(scope="module")
def emoji(host: ComfyServer) -> None:
    """The tiny pretrained model in the host's list of checkpoints."""
    provide_checkpoint(host.models)


def test_the_bounds_were_measured_with_these_settings() -> None:
    assert BOUNDS["settings"] == SMOKE
    assert max(f for _, f, _ in BOUNDS["random"]) < BOUNDS["fidelity_at_least"]


def test_the_shipped_model_draws_what_it_is_asked(emoji: None, client: Client) -> None:
    """Through stock nodes: two seeds of one caption are nearer to each other than to other captions' pictures."""
    names = [text for text, _ in other_prompts()]
    assert set(names) <= {c.name for c in concepts()}
    first = drawn(client, [(name, 1) for name in names])
    second = drawn(client, [(name, 2) for name in names])
    gap = np.array([[drift(a[None], b[None]) for b in second] for a in first])
    right = (gap.argmin(1) == np.arange(len(names))).mean()
    assert right >= 0.75, "two seeds of one caption are further apart than pictures of other captions"
    red, blue = drawn(client, [(caption(names[0], colour), 1) for colour in ("red", "blue")])
    assert red[0, 0, 0] > 150 > red[0, 0, 2] and blue[0, 0, 2] > 150 > blue[0, 0, 0]


def test_training_teaches_and_does_not_destroy(emoji: None, host: ComfyServer, client: Client) -> None:
    base = likeness(drawn(client, subject_prompts(SUBJECT)), SUBJECT)
    others = drawn(client, other_prompts())
    file = train(host, client, SUBJECT, seed=0, **SMOKE)
    chance = random_like(file, host.models / "oft" / "subjects" / "chance.safetensors", 0)
    result = {}
    for path in (file, chance):
        name = path.relative_to(host.models / "oft").as_posix()
        gained = likeness(drawn(client, subject_prompts(SUBJECT), name), SUBJECT) - base
        result[path] = gained, drift(drawn(client, other_prompts(), name), others)
    assert result[file][0] >= BOUNDS["fidelity_at_least"], "the subject was not learnt"
    assert result[file][1] <= BOUNDS["drift_at_most"], "other captions were damaged"
    assert result[chance][0] < BOUNDS["fidelity_at_least"], "random rotations of the same angles do as well"
