"""F16-F18: Hugging Face PEFT's other orthogonal methods: RoAd, HRA and PSOFT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..constraint import Constraint, Strength
from ..layer import LayerRotation
from ..rotation import block_size_of
from ..subspace import Principal, reflected
from .common import Context, Maker, Module, Piece, frobenius, series_terms, skew_pack, truth

#: Channels in which RoAd pairs the first half with the second, where no config says another number.
ROAD_GROUP = 64


def _config(context: Context, what: str) -> dict:
    if context.config is None:
        context.note(f"No adapter_config.json beside the file: {what} assumed.")
    return dict(context.config or {})


def read_f16(module: Module) -> Maker:
    """F16 (PEFT RoAd, Dong et al. 2024, arXiv 2409.00119): ``road_theta``, ``road_alpha``; channels of the output turn in pairs.

    Variant 1 has one angle and one factor a pair and is a rotation with row factors; 2 and 4 have one or two a channel and are
    finished matrices. The bias turns too, as in PEFT's merge.
    """
    for needed in ("road_theta", "road_alpha"):
        if needed not in module:
            raise module.format_error("A RoAd layer is incomplete", found=", ".join(module.tensors), expected=needed)
    theta, alpha = (module.get(name).reshape(-1) for name in ("road_theta", "road_alpha"))
    if theta.numel() != alpha.numel() or not theta.numel():
        raise module.shape_error("Angles and factors of a RoAd layer differ in number", alpha.numel(), theta.numel() or "angles")
    config = _config(module.context, f"variant by size, groups of {ROAD_GROUP}")
    group = int(module.context.number("group_size", config.get("group_size"), ROAD_GROUP))
    said = {"road_1": 1, "road_2": 2, "road_4": 4}.get(str(config.get("variant", "")))

    def make(shape: Sequence[int] | None) -> list[Piece]:
        variant = said or _variant(theta.numel(), shape) or 1
        size = 2 * theta.numel() // variant
        if group < 2 or group % 2 or not size or size % group:
            raise module.shape_error("RoAd's groups do not divide the layer", f"groups of {group}, size {size}", "an even divisor")
        if variant > 1:
            module.context.note(f"RoAd's variant {variant} is no rotation: each channel has an angle and a factor of its own. Applied as it is.")
        op = _pairs(theta, alpha, group) if variant == 1 else _channels(theta, alpha, group, variant)
        return [Piece(op), Piece(op, "bias")]

    return make


def _variant(stored: int, shape: Sequence[int] | None) -> int | None:
    return None if shape is None else {shape[0]: 1, 2 * shape[0]: 2, 4 * shape[0]: 4}.get(2 * stored)


def _pairs(theta: Tensor, alpha: Tensor, group: int) -> LayerRotation:
    half = group // 2
    angles = theta.view(-1, half)
    generator = angles.new_zeros(len(angles), group, group)
    first = torch.arange(half)
    generator[:, first, first + half] = -angles
    packed = skew_pack(generator).unsqueeze(0)
    return LayerRotation("out", group, len(angles), "expm", generator=packed, row_scale=alpha.view(-1, half).repeat(1, 2).flatten())


def _channels(theta: Tensor, alpha: Tensor, group: int, variant: int) -> LayerRotation:
    if variant == 2:
        own, other = alpha * theta.cos(), alpha * theta.sin()
    else:  # a group's numbers for its own channels come first, those for their partners after them
        t, a = theta.view(-1, 2, group), alpha.view(-1, 2, group)
        own, other = (a[:, 0] * t[:, 0].cos()).flatten(), (a[:, 1] * t[:, 1].sin()).flatten()
    half, count = group // 2, own.numel() // group
    matrix = torch.diag_embed(own.view(count, group))
    first, other = torch.arange(half), other.view(count, group)
    matrix[:, first, first + half] = -other[:, :half]
    matrix[:, first + half, first] = other[:, half:]
    return LayerRotation("out", group, count, "matrix", matrix=matrix.unsqueeze(0))


def read_f17(module: Module) -> Maker:
    """F17 (PEFT HRA, Yuan et al. 2024, arXiv 2405.17484): ``hra_u`` (in, r), W H with r Householder reflections."""
    vectors = module.get("hra_u")
    if vectors.ndim != 2 or not 0 < vectors.shape[1] <= vectors.shape[0]:
        raise module.shape_error("'hra_u' must hold one vector a reflection", tuple(vectors.shape), "(in, r)")
    if float(vectors.norm(dim=0).min()) == 0:
        raise module.format_error("A reflection has no direction", found="a vector of zeros", expected="vectors")
    config = _config(module.context, "reflections without Gram-Schmidt (apply_GS)")
    basis, h = reflected(vectors, truth(config.get("apply_GS")))
    op = LayerRotation("in", vectors.shape[1], 1, "matrix", matrix=h.t().float()[None, None].contiguous(), basis=basis)
    return lambda shape: [Piece(op)]


def read_f18(module: Module) -> Maker:
    """F18 (PEFT PSOFT): ``psoft_R.weight``, a rotation of the weight's first right singular vectors; ``vector_a``, ``vector_b`` scale it.

    W' = W + U S (diag(b) R diag(a) - 1) V^T with the base weight's own U, S, V.
    """
    config = _config(module.context, "PSOFT's defaults")
    if config.get("ab_svd_init", "psoft_init") != "psoft_init":
        raise module.format_error(
            "This PSOFT adapter starts from PiSSA, which is no rotation of the weight", found=repr(config["ab_svd_init"]), expected="'psoft_init'"
        )
    stored = module.get("psoft_R.weight")
    number = module.context.number
    passes = int(number("psoft_svd_lowrank_niter", config.get("psoft_svd_lowrank_niter"), 10))
    seed = int(number("random_seed", config.get("random_seed"), 0))
    if not 1 <= passes <= 1000 or not 0 <= seed < 2**63:
        raise module.format_error("PSOFT's config is out of range", found=f"{passes} passes, seed {seed}", expected="1 to 1000, 0 or more")
    base = Principal("lowrank" if config.get("psoft_svd") == "lowrank" else "full", passes, seed)
    module.context.note(
        "PSOFT turns the weights' own singular vectors, which the file does not hold: right on the base model that it was trained on, "
        "as PEFT finds them on a CPU."
    )
    if base.way == "lowrank":
        module.context.note(
            "This PSOFT adapter was trained on a randomised SVD (psoft_svd='lowrank'), whose vectors are not quite the weight's own; what "
            "it leaves out is not applied, so the change differs from PEFT's by a few per cent."
        )
    scales = [module.get(f"psoft_R.vector_{x}") for x in "ab"]
    if stored.ndim == 2 and stored.shape[0] == stored.shape[1]:
        return _as_matrix(stored, scales, base)
    size = block_size_of(stored.numel()) if stored.ndim == 1 else None
    if size is None:
        raise module.shape_error("'psoft_R.weight' must hold a packed skew matrix or a square one", tuple(stored.shape), "(r(r-1)/2,)")
    series = truth(config.get("use_cayley_neumann", False))
    packed = -stored.view(1, 1, -1)  # M is the transpose of PEFT's R
    limit = None
    if series and config.get("cayley_neumann_eps") is not None:
        eps = module.context.limit("cayley_neumann_eps", number("cayley_neumann_eps", config["cayley_neumann_eps"], 0))
        limit = Constraint("PSOFT: norm of the generator", eps, frobenius(packed, True))
    terms = series_terms(number("num_cayley_neumann_terms", config.get("num_cayley_neumann_terms"), 5), module.context)
    op = LayerRotation("in", size, 1, "neumann" if series else "cayley", terms, generator=packed, constraint=limit, basis_of=base)
    if all(s is None or torch.equal(s, torch.ones_like(s)) for s in scales):
        return lambda shape: [Piece(op)]
    rotation = op.build(Strength()).matrices[0, 0].t()
    return _as_matrix(rotation, scales, base)


def _as_matrix(r: Tensor, scales: Sequence[Tensor | None], base: Principal) -> Maker:
    a, b = scales
    r = r if b is None else b.unsqueeze(1) * r
    r = r if a is None else r * a
    op = LayerRotation("in", len(r), 1, "matrix", matrix=r.t()[None, None].contiguous(), basis_of=base)
    return lambda shape: [Piece(op)]
