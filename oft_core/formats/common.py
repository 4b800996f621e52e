"""What every dialect reader is given, and the small steps they share."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import FormatError, ShapeError
from ..layer import Diff, LayerRotation
from ..rotation import block_size_of
from ..tensors import normal_tensors


@dataclass(frozen=True)
class ReadOptions:
    """What tensors alone cannot tell; ``auto`` follows metadata, then the documented default.

    allow_pickle: read .bin/.pt files (with ``weights_only=True``).   peft_neumann: how ``oft_R`` files build their matrices, by the
    ``old`` series (PEFT 0.16-0.17, OneTrainer until 2025-11-15), the ``new`` one, or PEFT's ``exact`` Cayley transform
    (``use_cayley_neumann=False``).   peft_terms: terms of PEFT's series, 1 to 1000.   peft_coft: eps of PEFT's COFT limit.
    For both 0 means as the config says, without one 5 terms and no limit.
    oft_writer: whose ``oft_R`` files under bare names are, ``peft`` or ``onetrainer``: these turn convolutions in opposite directions.
    peft_base: what becomes of the base model's tensors in the saved state of a whole PEFT model, ``ignore`` or ``apply``; auto: only
    the biases count that the config calls trained.
    adapter_name: which one of several PEFT adapters in a file.
    alpha_rule: limit of ``oft_blocks`` files, ``scaled`` (alpha times output size) or ``raw`` (ComfyUI's trainer).
    scaled_divisor: of ``scaled_oft`` files, ``new`` 2 sqrt(b-1) or ``old`` sqrt(b(b-1)/2) (fork files before March 2026).
    rotate_bias: kohya files of 2023 rotated the bias as well while training; default off, as that tool's own merge.
    oft_diag: old LyCORIS matrices, ``rotation`` or ``additive``.   boft_conv: PEFT BOFT convolutions, ``old`` (before 0.14) or ``new``.
    """

    allow_pickle: bool = False
    peft_neumann: str = "auto"
    alpha_rule: str = "auto"
    scaled_divisor: str = "auto"
    rotate_bias: str = "auto"
    oft_diag: str = "auto"
    boft_conv: str = "auto"
    oft_writer: str = "auto"
    peft_base: str = "auto"
    peft_terms: int = 0
    peft_coft: float = 0.0
    adapter_name: str = ""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "peft_neumann": ("auto", "old", "new", "exact"),
        "alpha_rule": ("auto", "scaled", "raw"),
        "scaled_divisor": ("auto", "new", "old"),
        "rotate_bias": ("auto", "on", "off"),
        "oft_diag": ("auto", "rotation", "additive"),
        "boft_conv": ("auto", "old", "new"),
        "oft_writer": ("auto", "peft", "onetrainer"),
        "peft_base": ("auto", "ignore", "apply"),
    }

    def __post_init__(self) -> None:
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not 0 <= self.peft_terms <= 1000:
            raise ValueError(f"peft_terms must be 0 (as the config says) to 1000, not {self.peft_terms!r}")
        if not 0 <= self.peft_coft < math.inf:
            raise ValueError(f"peft_coft must be 0 (as the config says) or a positive number, not {self.peft_coft!r}")


@dataclass(frozen=True)
class Piece:
    """One operation on one parameter of a layer: ``weight`` or ``bias``, all rows or (start, length)."""

    op: LayerRotation | Diff
    param: str = "weight"
    rows: tuple[int, int] | None = None


#: weight shape, or None if no model is at hand (then a plain Linear layer is assumed) -> what to do.
Maker = Callable[[Sequence[int] | None], list[Piece]]


@dataclass
class Context:
    """Facts about the whole file that readers may need.

    peft: why the key names are PEFT's, "" if they are not.   base: how many tensors of a base model the file holds.
    """

    file: str
    metadata: Mapping[str, str]
    config: Mapping[str, object] | None
    options: ReadOptions
    peft: str = ""
    base: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Remember a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def json(self, key: str) -> dict:
        """A metadata value that holds a JSON object; {} if absent or not one."""
        try:
            value = json.loads(self.metadata.get(key, "") or "{}")
        except (ValueError, RecursionError):  # also numbers too long to read, and brackets nested without end
            return {}
        return value if isinstance(value, dict) else {}

    def number(self, name: str, value: object, default: float) -> float:
        """A number from a config or from metadata, finite; ``default`` for null. Raises FormatError for anything else."""
        if value is None:
            return default
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise FormatError(f"'{name}' is not a number", file=self.file, found=repr(value)[:80], expected="a finite number")
        return number

    def limit(self, name: str, value: float | None) -> float | None:
        """The same limit on a generator, None for none. Raises FormatError for a negative one, which would turn the rotation round."""
        if value is not None and value < 0:
            raise FormatError(f"The limit '{name}' is negative", file=self.file, found=f"{value:g}", expected="0 or more")
        return value

    @property
    def trainer_metadata(self) -> bool:
        """Whether a kohya-style or LyCORIS trainer left its metadata."""
        return any(k.startswith("ss_") for k in self.metadata) or "lycoris_config" in self.metadata


@dataclass(slots=True)
class Module:
    """All tensors of one adapted layer, by suffix."""

    name: str
    tensors: dict[str, Tensor]
    context: Context

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def get(self, suffix: str) -> Tensor | None:
        """The tensor in float32, or None."""
        t = self.tensors.get(suffix)
        return None if t is None else t.detach().to(torch.float32)

    def number(self, suffix: str) -> float | None:
        """A stored scalar as a float; None if absent. Raises ShapeError if it is not a scalar."""
        t = self.tensors.get(suffix)
        if t is None:
            return None
        if t.numel() != 1:
            raise self.shape_error(f"'{suffix}' must be a single number", tuple(t.shape), "one value")
        return float(t.detach().double().reshape(()))

    def blocks(self, suffix: str, ndim: int = 3) -> Tensor:
        """Square blocks (..., b, b) in float32. Raises ShapeError if they are not square or of another rank."""
        t = self.get(suffix)
        if t.ndim != ndim or t.shape[-1] != t.shape[-2] or t.numel() == 0:
            raise self.shape_error(f"'{suffix}' must hold square blocks", tuple(t.shape), "(" + "n, " * (ndim - 2) + "b, b)")
        return t

    def butterfly(self, suffix: str, first_permuted: bool) -> Tensor:
        """Butterfly factors (stages, n, b, b) in float32. first_permuted: whether stage 0 reorders entries too (LyCORIS).

        Raises ShapeError for other shapes.
        """
        t = self.blocks(suffix, 4)
        stages, n, b, _ = t.shape
        if (stages > 1 or first_permuted) and (b % 2 or n % 2 ** min(stages - 1, 62)):
            raise self.shape_error("These factors do not form a butterfly", tuple(t.shape), "even b, n divisible by 2^(stages-1)")
        return t

    def packed(self, suffix: str) -> tuple[Tensor, int]:
        """Packed skew vectors (1, n, b(b-1)/2) in float32 and b. Raises ShapeError for an impossible length."""
        v = self.get(suffix)
        b = block_size_of(v.shape[-1]) if v.ndim == 2 and v.shape[0] else None
        if b is None:
            raise self.shape_error(f"'{suffix}' must hold packed skew vectors", tuple(v.shape), "(blocks, b(b-1)/2)")
        return v.unsqueeze(0), b

    def row_factors(self, suffix: str) -> Tensor:
        """One factor an output row (or column), float32 (rows,). Raises ShapeError without any."""
        factors = self.get(suffix).reshape(-1)
        if not factors.numel():
            raise self.shape_error(f"'{suffix}' is empty", tuple(self.tensors[suffix].shape), "factors")
        return factors

    def shape_error(self, message: str, found: object, expected: object) -> ShapeError:
        return ShapeError(message, file=self.context.file, module=self.name, found=found, expected=expected)

    def format_error(self, message: str, found: object = None, expected: object = None) -> FormatError:
        return FormatError(message, file=self.context.file, module=self.name, found=found, expected=expected)


def series_terms(number: float | None, context: Context) -> int:
    """Number of terms of a Cayley-Neumann series, 5 if the file does not say. Raises FormatError outside of 1 ... 1,000."""
    if number is not None and not 1 <= number <= 1000:
        raise FormatError("This is no number of terms for a Neumann series", file=context.file, found=f"{number:g}", expected="1 to 1000")
    return 5 if number is None else int(number)


def skew_pack(a: Tensor, by: float = 1.0) -> Tensor:
    """Stored square blocks A (..., b, b) -> packed by * (A - A^T), float32 (..., b(b-1)/2)."""
    b = a.shape[-1]
    flat = a.reshape(-1, b * b)
    upper, lower = _triangles(b)
    packed = flat.index_select(1, upper).sub_(flat.index_select(1, lower))
    return (packed if by == 1 else packed.mul_(by)).view(*a.shape[:-2], len(upper))


@functools.lru_cache(32)
def _triangles(b: int) -> tuple[Tensor, Tensor]:
    """Where the entries above the diagonal of a flat block stand, row by row, and those that mirror them."""
    with normal_tensors():
        i, j = torch.triu_indices(b, b, 1)
        return i * b + j, j * b + i


def scaled(packed: Tensor, by: float) -> Tensor:
    """The vectors times a number; the file's own where it is 1, for they may be all of a large file."""
    return packed if by == 1 else packed * by


def frobenius(packed: Tensor, per_block: bool) -> Tensor:
    """Frobenius norm of the skew matrices behind packed vectors (stages, n, p): (n,) each (one stage), or () over everything."""
    norm = packed.double().square().sum((0, -1)) if per_block else packed.double().square().sum()
    return (2 * norm).sqrt().float()


def side_length(shape: Sequence[int], side: str) -> int:
    """Length of the flattened weight's output or input axis."""
    rest = 1
    for n in shape[1:]:
        rest *= n
    return shape[0] if side == "out" else rest


def block_count(module: Module, stored: int, block: int, shape: Sequence[int] | None, side: str, shared: bool) -> int:
    """Number of blocks along the axis: as stored, or from the layer where one block is shared.

    Raises ShapeError if a shared block does not divide the layer. A block count that does not fit is found later, at binding.
    """
    if stored > 1 or not shared or shape is None:
        return stored
    length = side_length(shape, side)
    if length % block:
        raise module.shape_error("The shared block does not divide the layer", f"block {block}, size {length}", "a divisor")
    return length // block


def conv_like(shape: Sequence[int] | None) -> bool:
    """Whether a weight of this shape belongs to a convolution (any kernel size); False if no shape is known."""
    return shape is not None and len(shape) > 2


def truth(value: object) -> bool:
    """A flag from JSON metadata or a config: true, 1, "True"."""
    return value is True or str(value).lower() in ("true", "1", "1.0")

