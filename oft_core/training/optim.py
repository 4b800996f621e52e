"""Optimizers by name, imported only when chosen, and learning-rate schedules as plain functions of the step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .errors import ConfigError, TrainingError


@dataclass(frozen=True)
class Choice:
    """One optimizer: where its class is found, and the pip package that brings it."""

    module: str
    name: str
    package: str
    #: arguments that fit small rotation parameters, unless the user gives others
    defaults: tuple[tuple[str, object], ...] = ()


OPTIMIZERS: dict[str, Choice] = {
    "adamw": Choice("torch.optim", "AdamW", "torch"),
    "adamw8bit": Choice("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "prodigy": Choice(
        "prodigyopt", "Prodigy", "prodigyopt", (("safeguard_warmup", True), ("use_bias_correction", True))
    ),  # learning rate 1
    # Its steps are a share of the parameter's own size, at least of the second eps: rotations start at 0.
    "adafactor": Choice("torch.optim", "Adafactor", "torch (2.5 or newer)", (("eps", (None, 1.0)),)),
    "came": Choice("came_pytorch", "CAME", "came-pytorch"),  # learning rate a tenth of AdamW's
    "lion": Choice("lion_pytorch", "Lion", "lion-pytorch"),  # a third
    "schedulefree": Choice("schedulefree", "AdamWScheduleFree", "schedulefree"),  # with the constant schedule
}
SCHEDULES = ("constant", "linear", "cosine")


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, object]], lr: float, weight_decay: float = 0.0, **arguments: object
) -> torch.optim.Optimizer:
    """The optimizer ``name`` for parameter groups ({"params": [...], "lr": ...}).

    Raises ConfigError for an unknown name or argument, TrainingError naming the pip package if it is not installed.
    """
    choice = OPTIMIZERS.get(name)
    if choice is None:
        raise ConfigError("Unknown optimizer", found=repr(name), expected=" or ".join(OPTIMIZERS))
    try:
        cls = getattr(importlib.import_module(choice.module), choice.name)
    except (ImportError, AttributeError) as error:
        raise TrainingError(
            f"The optimizer '{name}' needs the package {choice.package}", found=str(error),
            hint=f"Install it into ComfyUI's Python (pip install {choice.package.split()[0]}), or choose adamw.",
        ) from error
    settings = {"lr": lr, "weight_decay": weight_decay, **dict(choice.defaults), **arguments}
    try:
        return cls([dict(g) for g in groups], **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"The optimizer '{name}' does not take these arguments", found=f"{settings}: {error}") from error


def limit_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, project_: Callable[[torch.Tensor], None]) -> None:
    """Apply ``project_`` (in place, onto a convex set that holds 0) to what the optimizer's step has made of a parameter.

    A schedule-free optimizer's parameter is y = (1 - beta) z + beta x, x a running mean of z with weight c for the newest. There z is
    projected, and x and y follow by its share in them: with y alone limited, z would grow on and the mean would leave the set.
    """
    z = optimizer.state.get(parameter, {}).get("z")
    if z is None:
        project_(parameter.data)
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    newest = group["k"] ** group["r"] * group["lr_max"] ** group["weight_lr_power"] / group["weight_sum"]
    before = z.clone()
    project_(z)
    parameter.data.add_(z - before, alpha=1 - group["betas"][0] * (1 - newest))


def schedule(name: str, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """Factor of the learning rate at step 0, 1, ...: a linear rise over ``warmup`` steps, then constant, or down to 0 at ``steps``."""
    if name not in SCHEDULES:
        raise ConfigError("Unknown schedule", found=repr(name), expected=" or ".join(SCHEDULES))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if name == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 1 - done if name == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor


def averaged_values(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor] | None:
    """Copies of the parameters that a schedule-free optimizer would evaluate with; None for other optimizers.

    The parameters are put back bit for bit: its own switching back and forth would round.
    """
    if not hasattr(optimizer, "eval") or not hasattr(optimizer, "train"):
        return None
    before = [p.detach().clone() for p in named.values()]
    flags = [g.get("train_mode") for g in optimizer.param_groups]
    optimizer.eval()
    out = {n: p.detach().clone() for n, p in named.items()}
    with torch.no_grad():
        for p, old in zip(named.values(), before, strict=True):
            p.copy_(old)
    for g, flag in zip(optimizer.param_groups, flags, strict=True):
        g["train_mode"] = flag
    return out
