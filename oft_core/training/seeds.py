"""Random numbers that depend on what they are for, not on what was drawn before: a resumed run needs no replay."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A fresh CPU generator for (seed, purpose): the same words and numbers always give the same stream, on every machine."""
    text = repr((int(seed), *[str(p) for p in purpose])).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return torch.Generator("cpu").manual_seed(number >> 1)


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Some host code draws from torch's common generator. Inside it starts from `seed`; outside nobody notices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
