"""F6-F10: Hugging Face PEFT's OFT in its four forms, and BOFT."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..constraint import Constraint
from ..layer import LayerRotation
from .common import (
    Context,
    Maker,
    Module,
    Piece,
    block_count,
    conv_like,
    frobenius,
    scaled,
    series_terms,
    side_length,
    skew_pack,
    truth,
)

DEFAULT_EPS = 6e-5
#: peft_type of the configs that are of one of our dialects.
PEFT_TYPES = ("OFT", "BOFT", "HRA", "ROAD", "PSOFT")


def coft(context: Context) -> float | None:
    """eps of PEFT's constrained OFT, or None if neither the read option nor the config switches it on."""
    if context.options.peft_coft:
        return context.options.peft_coft
    if context.config is None:
        context.note("No adapter_config.json beside the file: no COFT limit assumed (read option peft_coft).")
    config = context.config or {}
    return context.limit("eps", context.number("eps", config.get("eps"), DEFAULT_EPS)) if truth(config.get("coft")) else None


def shared(context: Context) -> bool:
    config = context.config
    return True if config is None else truth(config.get("block_share"))


def _raw_norms(blocks: Tensor) -> Tensor:
    """Frobenius norm of each raw block (n, b, b) -> (n,): PEFT's first versions limit A, not its skew part."""
    return blocks.flatten(1).norm(dim=1)


def read_f6(module: Module) -> Maker:
    """F6 (PEFT 0.7-0.13): ``oft_r`` (r, d, d) on the output side, M = cayley((A - A^T)/2); the last block may be cut."""
    a = module.blocks("oft_r")
    stored, d = a.shape[0], a.shape[-1]
    packed = skew_pack(a, 0.5).unsqueeze(0)
    eps = coft(module.context)

    def make(shape: Sequence[int] | None) -> list[Piece]:
        count, size = stored, None
        if shape is not None:
            # r blocks of ceil(out/r) each; PEFT cuts what hangs over the edge, which may be whole blocks (r = 7 on 24 outputs).
            count = math.ceil(shape[0] / d)
            if stored == 1 and not shared(module.context) or stored > 1 and d != math.ceil(shape[0] / stored):
                count = stored  # for another layer; refused when it is bound
            elif count * d != shape[0]:
                size = shape[0]
        kept = packed if stored == 1 else packed[:, :count]
        limit = None if eps is None else Constraint(
            "PEFT <= 0.13: eps x block size^2 / sqrt(blocks), per block", eps * d * d / math.sqrt(stored), _raw_norms(a)[: kept.shape[1]]
        )
        return [Piece(LayerRotation("out", d, count, generator=kept, constraint=limit, size=size))]

    return make


def read_f7(module: Module) -> Maker:
    """F7 (PEFT 0.14-0.15): ``oft_r`` (r, b, b) on the input side, W cayley((A - A^T)/2), rows times ``oft_s``."""
    a = module.blocks("oft_r")
    stored, b = a.shape[0], a.shape[-1]
    packed = skew_pack(a, -0.5).unsqueeze(0)
    rows = module.row_factors("oft_s")
    eps = coft(module.context)

    def make(shape: Sequence[int] | None) -> list[Piece]:
        count = block_count(module, stored, b, shape, "in", shared(module.context))
        limit = None if eps is None else Constraint(
            "PEFT 0.14-0.15: eps x ceil(out/blocks)^2 / sqrt(blocks), per block",
            eps * math.ceil(rows.numel() / count) ** 2 / math.sqrt(stored), _raw_norms(a),
        )
        return [Piece(LayerRotation("in", b, count, generator=packed, constraint=limit, row_scale=rows))]

    return make


def series(context: Context) -> tuple[str, int, str]:
    """(kind, terms, format id) of an ``oft_R`` file made by PEFT: F8 with the old series or F9 with the new.

    Read options go before the config.
    """
    config, options = context.config, context.options
    chosen = options.peft_neumann
    name = "num_cayley_neumann_terms"
    terms = series_terms(options.peft_terms or context.number(name, (config or {}).get(name), 5), context)
    old = chosen == "old"
    if chosen == "auto" and config is not None:
        # Versions from 0.18 on write peft_version; a config without it is older.
        version = str(config.get("peft_version") or "0.17")
        numbers = [int(n) for n in version.split("+")[0].split("@")[0].split(".")[:2] if n.isdecimal()]
        old = numbers < [0, 18]
        if "peft_version" not in config:
            context.note("The config has no peft_version, so the series of PEFT 0.16-0.17 is used (read option peft_neumann).")
    if config is None and chosen in ("auto", "new", "old"):
        which = "older" if old else "newer"
        context.note(
            f"No adapter_config.json beside the file: PEFT's {which} series of {terms} terms assumed (read options peft_neumann, "
            "which also knows the exact transform of use_cayley_neumann=False, and peft_terms)."
        )
    exact = chosen == "exact" or chosen == "auto" and config is not None and not truth(config.get("use_cayley_neumann", True))
    kind = "cayley" if exact else "neumann_old" if old else "neumann"
    return kind, terms, "F8" if old else "F9"


def read_f9(module: Module) -> Maker:
    """F8/F9 (PEFT >= 0.16): ``oft_R.weight`` packed; W R^T for Linear and Conv, E R for ``oft_embedding_R.weight``."""
    embedding = "oft_embedding_R.weight" in module
    packed, b = module.packed("oft_embedding_R.weight" if embedding else "oft_R.weight")
    kind, terms, _ = series(module.context)
    # The exact branch of PEFT builds (I - Q)(I + Q)^-1, the transpose of what its series approximates.
    sign = -1.0 if kind == "cayley" else 1.0
    if embedding:
        sign = -sign
    stored = packed.shape[1]
    eps = coft(module.context)
    limit = None if eps is None else Constraint(
        "PEFT >= 0.16: eps / sqrt(blocks), per block", eps / math.sqrt(stored), frobenius(packed, True)
    )

    def make(shape: Sequence[int] | None) -> list[Piece]:
        count = block_count(module, stored, b, shape, "in", shared(module.context))
        if shape is not None and len(shape) > 2 and side_length(shape, "in") != shape[1]:
            module.context.note(
                "Convolutions larger than 1x1: PEFT's training forward is not its merge; the merge formula is applied."
            )
        return [Piece(LayerRotation("in", b, count, kind, terms, generator=scaled(packed, sign), constraint=limit))]

    return make


def read_f10(module: Module) -> Maker:
    """F10 (PEFT BOFT): ``boft_R`` (factors, n, b, b) on the input side, M = product of cayley(-(A - A^T)/2), rows times ``boft_s``."""
    a = module.butterfly("boft_R", False)
    _, n, b, _ = a.shape
    packed = skew_pack(a, -0.5)
    factors = module.row_factors("boft_s") if "boft_s" in module else None
    choice = module.context.options.boft_conv
    old = choice == "old" or choice == "auto" and "boft_P" in module

    def make(shape: Sequence[int] | None) -> list[Piece]:
        if old and conv_like(shape):
            module.context.note("BOFT convolutions as PEFT before 0.14 read them (weight memory not transposed; boft_conv).")
            return [
                Piece(LayerRotation("out", b, n, generator=packed, butterfly="peft", col_scale=factors, memory_view=True))
            ]
        return [Piece(LayerRotation("in", b, n, generator=packed, butterfly="peft", row_scale=factors))]

    return make
