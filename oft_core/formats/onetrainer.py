"""F11-F14: "OFT v2" of OneTrainer, its pull requests and forks, musubi-tuner's LTX-2 fork, sd-scripts and Takenoko.

All store packed skew vectors on the input side and, unlike PEFT, rotate convolutions in the opposite direction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from ..constraint import Constraint
from ..layer import LayerRotation
from .common import Maker, Module, Piece, block_count, conv_like, frobenius, scaled, series_terms, truth

#: OneTrainer dropped COFT on this day; its configs up to then may switch it on.
COFT_EPS = 1e-4
#: Its first two days built the series as PEFT 0.16-0.17 does.
NEW_SERIES_SINCE = "2025-11-16"
#: Until this day fork files with the ``scaled_oft`` marker divided by sqrt(b(b-1)/2).
SCALED_SINCE = "2026-03-04"
#: Numbers of a weight, far above any model's: two small factors of a damaged file can name more than any memory holds.
LARGEST_WEIGHT = 1 << 28


def flag(module: Module, suffix: str) -> bool:
    """A stored marker: present and not false (an empty tensor counts as set)."""
    t = module.tensors.get(suffix)
    return t is not None and (t.numel() == 0 or bool(t.reshape(-1)[0]))


def old_series(module: Module) -> bool:
    """Whether the series has 2 as its last coefficient: by option, else by OneTrainer's date."""
    context = module.context
    if context.options.peft_neumann != "auto":
        return context.options.peft_neumann == "old"
    date = context.metadata.get("modelspec.date", "")
    if "" < date < NEW_SERIES_SINCE and any(k.startswith("ot_") for k in context.metadata):
        context.note("The series of OneTrainer's first two days, by the file's date (read option peft_neumann).")
        return True
    return False


def divisor(module: Module, b: int) -> float:
    """What the generator is divided by (scaled OFT, so that one learning rate serves every block size)."""
    scaled = flag(module, "oft_R.scaled_oft")
    stored = module.number("scaled_oft_metadata")
    if stored is not None:
        scaled = bool(stored)
    if not scaled and "lora_magnitude_vector.weight" not in module:  # DoKr-OFT always scales
        return 1.0
    choice = module.context.options.scaled_divisor
    date = module.context.metadata.get("modelspec.date", "")
    if choice == "old" or choice == "auto" and "" < date < SCALED_SINCE:
        module.context.note("Scaled OFT with the divisor of early fork files, sqrt(b(b-1)/2) (read option scaled_divisor).")
        return math.sqrt(b * (b - 1) / 2)
    return 2 * math.sqrt(b - 1)


def coft_limit(module: Module, packed: torch.Tensor, conv: bool) -> Constraint | None:
    """eps / sqrt(blocks) per block, if the file's flags or training config switch COFT on."""
    eps = None
    if "oft_coft_metadata" in module:
        if module.number("oft_coft_metadata"):
            eps = module.number("coft_eps_metadata")
            eps = 6e-5 if eps is None else eps
    elif "oft_coft_buffer" in module:
        if module.number("oft_coft_buffer"):
            eps = module.number("oft_coft_eps_buffer")
            eps = 6e-5 if eps is None else eps
    else:
        config = module.context.json("ot_config")
        if truth(config.get("oft_coft")) and not conv:  # OneTrainer projected linear layers only
            eps = module.context.number("coft_eps", config.get("coft_eps"), COFT_EPS)
    if module.context.limit("coft_eps", eps) is None:
        return None
    return Constraint("eps / sqrt(blocks), per block", eps / math.sqrt(packed.shape[1]), frobenius(packed, True))


def read_oft_v2(module: Module) -> Maker:
    """F11-F14: Linear W R^T, Conv W R; then an optional DoRA row factor."""
    takenoko = "oft_rotation.weight" in module
    packed, b = module.packed("oft_rotation.weight" if takenoko else "oft_R.weight")
    stored = packed.shape[1]
    exponential = "oft_R.cans_exp" in module
    if module.context.options.peft_neumann == "exact":
        raise module.format_error("OneTrainer's files have no exact transform of PEFT's kind", found="peft_neumann=exact", expected="old or new")
    kind, terms = ("neumann_old" if old_series(module) else "neumann"), series_terms(module.number("oft_R.neumann_terms") or None, module.context)
    if exponential:
        kind = "expm"
    elif flag(module, "oft_R.cans_oft"):
        kind = "cayley"
    if takenoko:
        use = module.number("oft_use_cayley_neumann_buffer")
        kind = kind if use is None or use else "cayley"
        terms = series_terms(module.number("oft_num_cayley_neumann_terms_buffer") or None, module.context)
    direction = -1.0 if takenoko and kind == "cayley" else 1.0
    clip = module.context.limit("clipped_oft", module.number("oft_R.clipped_oft"))
    ratio, norm_of = dora_factor(module)
    columns = None
    if "dora_log_multiplier_col" in module:
        columns = module.row_factors("dora_log_multiplier_col")
        columns = (columns - columns.mean()).exp()
    lokr = lokr_factors(module)

    def make(shape: Sequence[int] | None) -> list[Piece]:
        conv = conv_like(shape)
        if exponential:
            # The matrix-exponential variant always scales, and scales convolutions twice as much.
            by = math.sqrt(b - 1) * (2 if conv else 1) if flag(module, "oft_R.scaled_oft") else 1.0
        else:
            by = divisor(module, b)
        if conv and not module.context.metadata and re.match(r"(?!lora_|oft|diffusion_model\.)[^.]+\.", module.name):
            module.context.note("Convolutions are turned as OneTrainer does; if PEFT wrote this file, use read option oft_writer.")
        sign = direction * (-1.0 if conv else 1.0)
        rotation = LayerRotation(
            "in", b, block_count(module, stored, b, shape, "in", True), kind, terms, generator=scaled(packed, sign / by),
            constraint=coft_limit(module, packed, conv),
            clip=clip, row_scale=ratio, norm_of=norm_of, added=None if lokr is None else lokr_delta(module, *lokr, shape),
            col_scale=columns,
        )
        return [Piece(rotation)]

    return make


def dora_factor(module: Module) -> tuple[torch.Tensor | None, str]:
    """(row factor, which norm it is still to be divided by) of the DoRA variants; (None, "") without one."""
    if "lora_magnitude_vector.weight" in module:
        return module.row_factors("lora_magnitude_vector.weight"), "current"
    factor: torch.Tensor | None = None
    norm_of = ""
    if "dora_scale" in module:
        factor = module.row_factors("dora_scale")
        if "initial_norm" in module:
            norm = module.row_factors("initial_norm")
            if norm.shape != factor.shape:
                raise module.shape_error("'dora_scale' and 'initial_norm' are of different length", factor.numel(), norm.numel())
            factor = factor / norm.clamp_min(1e-12)
        else:
            norm_of = "base"
    for suffix in ("dora_log_multiplier", "dora_log_multiplier_row"):
        if suffix in module:
            factor = _times(module, factor, suffix, module.row_factors(suffix).exp())
    if "dora_multiplier" in module:
        factor = _times(module, factor, "dora_multiplier", module.row_factors("dora_multiplier"))
    return factor, norm_of


def _times(module: Module, factor: torch.Tensor | None, suffix: str, extra: torch.Tensor) -> torch.Tensor:
    """The product of a layer's row factors. Raises ShapeError for factors of different length."""
    if factor is not None and factor.shape != extra.shape:
        raise module.shape_error(f"'{suffix}' does not fit the layer's other row factors", extra.numel(), factor.numel())
    return extra if factor is None else factor * extra


def lokr_factors(module: Module) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """DoKr-OFT: the two factors of the Kronecker product that is added before the rotation, and its scale; None without one.

    ``alpha`` is LoKr's: over the rank of the second factor, and without effect where that factor is whole.
    """

    def factor(name: str) -> tuple[torch.Tensor | None, int | None]:
        whole = module.get(name)
        if whole is not None:
            return whole, None
        a, c = module.get(f"{name}_a"), module.get(f"{name}_b")
        if a is None or c is None:
            return None, None
        if min(a.ndim, c.ndim) < 2 or a.shape[1:].numel() != c.shape[0]:
            raise module.shape_error(
                f"'{name}_a' and '{name}_b' do not fit together", f"{tuple(a.shape)} and {tuple(c.shape)}", "(n, rank) and (rank, m)"
            )
        return (a.flatten(1) @ c.flatten(1)).view(a.shape[0], *c.shape[1:]), c.shape[0]

    first, _ = factor("lokr_w1")
    second, rank = factor("lokr_w2")
    if first is None and second is None:
        return None
    if first is None or second is None or "lokr_t2" in module:
        raise module.format_error(
            "The LoKr part of this layer is not of a known form", found=sorted(s for s in module.tensors if s.startswith("lokr")),
            expected="lokr_w1 and lokr_w2, whole or as _a and _b",
        )
    alpha = module.number("alpha")
    return first, second, 1.0 if rank is None or alpha is None else alpha / rank


def lokr_delta(
    module: Module, first: torch.Tensor, second: torch.Tensor, scale: float, shape: Sequence[int] | None
) -> torch.Tensor:
    """The Kronecker product (out, ...). Raises ShapeError if a weight of ``shape``, or without one any layer, cannot take it."""
    count = first.numel() * second.numel()
    if count > LARGEST_WEIGHT if shape is None else count != math.prod(shape):
        raise module.shape_error(
            "The LoKr part does not fit the layer", f"factors {tuple(first.shape)} and {tuple(second.shape)}",
            f"a product of at most {LARGEST_WEIGHT} numbers" if shape is None else f"a product of the weight's shape {tuple(shape)}",
        )
    if first.ndim < second.ndim:
        first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return torch.kron(first, second.contiguous()) * scale
