"""Rotations inside a subspace of a layer's inputs: the directions, and what reflections do to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tensors import full_precision


@dataclass(frozen=True)
class Principal:
    """The first right singular vectors of the unpatched weight, as PSOFT finds them (PEFT 0.19 and later).

    way: ``full`` or ``lowrank`` (randomised).   passes: power iterations of the latter.   seed: of its random numbers.
    """

    way: str = "full"
    passes: int = 10
    seed: int = 0
    _known: dict = field(default_factory=dict, repr=False, compare=False, hash=False)

    @full_precision()
    def directions(self, weight: Tensor, count: int) -> Tensor:
        """Columns (in, count) float32 of a weight (out, in), on its device; computed on the CPU and kept for the same weight.

        Singular vectors have no sign of their own: these have the signs that LAPACK gives, as in PEFT on a CPU.
        """
        w = weight.detach().to("cpu", torch.float32).flatten(1)
        key = (tuple(w.shape), count, *map(float, (w.double().sum(), w.double().norm())))
        if key not in self._known:
            self._known.clear()
            self._known[key] = self._computed(w, count)
        return self._known[key].to(weight.device)

    def _computed(self, w: Tensor, count: int) -> Tensor:
        if self.way == "full":
            return torch.linalg.svd(w, full_matrices=False)[2][:count].t().contiguous()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return torch.svd_lowrank(w, q=count, niter=self.passes)[2][:, :count].contiguous()


def reflected(vectors: Tensor, orthogonalise: bool) -> tuple[Tensor, Tensor]:
    """Householder reflections along ``vectors`` (n, r) as a matrix in their span: basis (n, r) float32 and (r, r) float64.

    The product is H_1 H_2 ... H_r, H_i = 1 - 2 u_i u_i^T with u_i = v_i / |v_i| (HRA, Yuan et al. 2024, arXiv 2405.17484);
    orthogonalise: the vectors are made orthonormal first (its Gram-Schmidt form), which makes it 1 - 2 V V^T.
    """
    basis, _ = torch.linalg.qr(vectors.double())
    if orthogonalise:
        return basis.float(), -torch.eye(vectors.shape[1], dtype=torch.float64)
    inside = basis.t() @ torch.nn.functional.normalize(vectors.double(), dim=0)
    m = torch.eye(vectors.shape[1], dtype=torch.float64)
    for u in inside.t():
        m = m - 2 * torch.outer(m @ u, u)
    return basis.float(), m
