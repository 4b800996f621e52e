"""The optimizer of stages 2 and 3: Muon (torch's own) for matrices and kernels, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Optimizer:
    """Muon sees kernels [out, in, 3, 3] as matrices [out, in * 9] that share their memory."""

    def __init__(self, muon: Iterable[nn.Parameter], rest: Iterable[nn.Parameter], muon_lr: float, lr: float) -> None:
        self.kernels = list(muon)
        self.parameters = [*self.kernels, *rest]
        self.matrices = [nn.Parameter(p.data.view(len(p), -1)) for p in self.kernels]
        self.parts = [
            torch.optim.Muon(self.matrices, lr=muon_lr, weight_decay=1e-4, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=1e-4, betas=(0.9, 0.98), fused=True),
        ]
        self.rates = [muon_lr, lr]

    def step(self, factor: float) -> None:
        """Clip gradients to norm 1, step at `factor` of the learning rates, and clear the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = kernel.grad.reshape(matrix.shape)
        for part, rate in zip(self.parts, self.rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor
            part.step()
        for parameter in (*self.parameters, *self.matrices):
            parameter.grad = None

    def state(self) -> list[dict[str, Tensor]]:
        return [part.state_dict() for part in self.parts]

    def load(self, state: list[dict[str, Tensor]]) -> None:
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)
