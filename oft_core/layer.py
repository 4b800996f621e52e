"""The canonical form of one adapted layer: what is stored and what it means. The files beside it say what is done with it.

After reading, every dialect is this. Conventions: a rotation acts on the vectors along one axis of the weight as w' = M w. ``out``
means the rows of the flattened weight (out, in*kh*kw), so W' = M W; ``in`` its columns, so W' = W M^T. M is block diagonal with
blocks of ``block`` rows, or a product of such matrices with permutations between them (butterfly), or one block in a subspace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import checks, measure, planes, spectra
from .apply import Factors, apply_layer_, factors_of
from .blocks import row_norms
from .build import Built, build_all
from .constraint import Constraint, Strength
from .diff import Diff
from .errors import ShapeError
from .limits import core_constraint
from .subspace import Principal

__all__ = ["Built", "Diff", "Factors", "LayerRotation", "build_all"]

#: An angle of a finished matrix closer to 180 degrees than this has no definite direction, hence no power.
_AMBIGUOUS = torch.pi - 2e-3


@dataclass
class LayerRotation:
    """One rotation of one layer, in the library's single convention (see the module's text).

    side: ``out`` or ``in``.   block: b.   count: number of blocks along the axis (n).
    kind: ``cayley``, ``neumann``, ``neumann_old``, ``expm`` (from ``generator``) or ``matrix`` (from ``matrix``).   terms: of a series.
    generator: packed skew vectors float32 (stages, n or 1, b(b-1)/2); one block stands for all of them (block share).
    matrix: finished matrices float32 (stages, n, b, b).
    butterfly: ``""`` (one stage) or the permutation family, ``lycoris`` or ``peft``.
    constraint: the COFT limit that the file asks for.   clip: spectral limit per block on lam (``clipped_oft``), part of the file.
    row_scale: factor of each output row (rows,) float32; divided by the base row norm if ``norm_of`` is set.
    norm_of: ``""``, ``base`` (row norms of the unpatched weight) or ``current`` (of the weight as it arrives).
    col_scale: factor of each column of the flattened weight, float32.
    memory_view: the weight's memory read as (numel/out, out), as PEFT's BOFT before 0.14 does for convolutions.
    core_alpha: raw alpha for the ``core`` mode; None if ComfyUI's own loader does not read this dialect.
    size: length of the rotated axis if it is not count*block (the last block is cut), else None.
    added: a difference of the weight's shape that is added before the rotation (DoKr-OFT's Kronecker product).
    of_layer: of a slice, the generator of all of the layer, which limits on the whole layer are measured on; else None.
    basis: orthonormal vectors (axis, block) float32 of the subspace that the one block turns; M is 1 outside of it (HRA).
    basis_of: a ``Principal`` if that subspace is the base weight's own (PSOFT); else None.
    """

    side: str
    block: int
    count: int
    kind: str = "cayley"
    terms: int = 5
    generator: Tensor | None = None
    matrix: Tensor | None = None
    butterfly: str = ""
    constraint: Constraint | None = None
    clip: float | None = None
    row_scale: Tensor | None = None
    norm_of: str = ""
    col_scale: Tensor | None = None
    memory_view: bool = False
    core_alpha: float | None = None
    size: int | None = None
    added: Tensor | None = None
    of_layer: Tensor | None = None
    basis: Tensor | None = None
    basis_of: Principal | None = None
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    # ---------------------------------------------------------------- description

    @property
    def stages(self) -> int:
        return (self.generator if self.generator is not None else self.matrix).shape[0]

    @property
    def stored(self) -> int:
        """Blocks that the file stores per stage: 1 with block share, else ``count``."""
        return (self.generator if self.generator is not None else self.matrix).shape[1]

    @property
    def axis(self) -> int:
        """Length of the rotated axis; 0 where only the weight tells it (``basis_of``)."""
        if self.subspace:
            return 0 if self.basis is None else self.basis.shape[0]
        return self.size or self.count * self.block

    @property
    def subspace(self) -> bool:
        """Whether the one block turns a subspace of the axis instead of a run of its entries."""
        return self.basis is not None or self.basis_of is not None

    @property
    def exact(self) -> bool:
        """Whether M is orthogonal at every strength of the rotation modes; where the last block is cut, all but that one are."""
        return self.kind in ("cayley", "expm")

    @property
    def needs_base(self) -> bool:
        """Whether ``measure`` of the unpatched weight is needed to apply this."""
        return self.norm_of == "base" or self.basis_of is not None

    def measure(self, weight: Tensor) -> Tensor:
        """What this layer needs of the unpatched weight (out, ...): row norms (out,), or directions (in, block); float32."""
        if self.basis_of is not None:
            return self.basis_of.directions(weight, self.block)
        return row_norms(weight)

    @property
    def half_turn(self) -> bool:
        """Whether finished matrices turn a plane by 180 degrees or reflect: that has no direction, hence no power and no logarithm."""
        return self.kind == "matrix" and float(spectra.spectrum_of(self).planes.max()) > _AMBIGUOUS

    def rotated_length(self, shape: Sequence[int]) -> int:
        """Length of the axis that this rotation would act on in a weight of ``shape``."""
        rest = math.prod(shape[1:])
        if self.memory_view:
            return rest
        return shape[0] if self.side == "out" else rest

    def check_shape(self, shape: Sequence[int], *, module: str | None = None, file: str | None = None) -> None:
        """Raises ShapeError if the weight (or row slice) of ``shape`` cannot take this rotation."""
        checks.check_shape(self, shape, module=module, file=file)

    def check_values(self, *, module: str | None = None, file: str | None = None) -> None:
        """Raises ValueFault if the stored numbers are finite but too large to make a rotation and factors of."""
        checks.check_values(self, module=module, file=file)

    def check_strength(self, strength: Strength, *, module: str | None = None, file: str | None = None) -> None:
        """Raises StrengthError where the mode is not defined for this layer at this strength."""
        checks.check_strength(self, strength, module=module, file=file)

    def rows_slice(self, start: int, length: int, *, module: str | None = None) -> LayerRotation:
        """The part of this rotation that acts on the output rows start ... start+length (a fused layer taken apart).

        Raises ShapeError if a block or a butterfly reaches over the cut.
        """
        if self.added is not None:
            raise ShapeError("A DoKr-OFT layer cannot be taken apart", module=module)
        if self.basis_of is not None:
            raise ShapeError("A PSOFT layer cannot be taken apart, as its subspace is that of the whole weight", module=module)
        scale = None if self.row_scale is None else self.row_scale[start : start + length]
        if self.side == "in":
            return replace(self, row_scale=scale, _cache=self._cache)
        b = self.block
        if start % b or length % b or self.butterfly or self.memory_view or self.size:
            raise ShapeError(
                "The file's blocks run across layers that are separate in this model", module=module,
                found=f"blocks of {b}", expected=f"blocks that divide {start} and {length}",
                hint="Use a model file in its original layout, where these layers are one.",
            )
        part = slice(start // b, (start + length) // b)
        cut = {} if self.stored == 1 else {
            name: t[:, part] for name in ("generator", "matrix") if (t := getattr(self, name)) is not None
        }
        if self.constraint is not None and self.constraint.norm.ndim and self.stored > 1:
            cut["constraint"] = replace(self.constraint, norm=self.constraint.norm[part])
        if self.kind != "matrix" and self.of_layer is None:
            cut["of_layer"] = self.generator
        return replace(self, count=length // b, row_scale=scale, _cache={}, **cut)

    # ---------------------------------------------------------------- planes and measures

    def lam_bound(self) -> float:
        """Upper bound of lam without limits, cheap."""
        return spectra.lam_bound(self)

    def largest_lam(self, device: torch.device | str = "cpu") -> Tensor:
        """Largest lam of every stored block without limits, float64 (stages, stored)."""
        return spectra.largest_lam(self, device)

    def logarithm(self, strength: Strength) -> Tensor:
        """log M of every stage and stored block at a strength, float64 (stages, stored, b, b); see ``planes.logarithm``."""
        return planes.logarithm(self, strength)

    def angles(self, strength: Strength | None = None) -> Tensor:
        """Rotation angle in radians of every plane (stages, stored, b) at strength 1, limits applied as ``strength.coft`` says."""
        return measure.layer_angles(self, strength)

    def reach(self, strength: Strength) -> float:
        """Largest angle in radians of any plane at a strength (mode rotation or geodesic), limits applied."""
        return measure.layer_reach(self, strength)

    def orthogonality_error(self) -> float:
        """max |M^T M - I| over all blocks at strength 1. Cached."""
        return measure.layer_error(self)

    def as_core(self) -> bool:
        """Whether ComfyUI's own loader makes the same of this layer at strength 1, in exact arithmetic."""
        if self.core_alpha is None or self.row_scale is not None or self.col_scale is not None:
            return False
        own = torch.ones((), dtype=torch.float64) if self.constraint is None else self.constraint.factor()
        return torch.allclose(own, core_constraint(self).factor(), rtol=1e-6, atol=0.0)

    def built_bytes(self, mode: str) -> int:
        """Bytes that ``build`` gives in this mode, for planning."""
        if self.butterfly and mode == "geodesic":
            return 4 * self.axis**2
        return 4 * self.stages * self.stored * self.block**2

    # ---------------------------------------------------------------- building and application

    def build(self, strength: Strength, device: torch.device | str = "cpu") -> Built | None:
        """The matrices at a strength, float32 on ``device``; None at strength 0, where the weight stays as it is."""
        return build_all([self], strength, device)[0]

    def apply_(
        self, weight: Tensor, strength: Strength, *, rotation: Built | None = None, measured: Tensor | None = None
    ) -> None:
        """Apply to ``weight`` (out, ...) of any floating dtype, in place; see ``apply.apply_layer_``."""
        apply_layer_(self, weight, strength, rotation=rotation, measured=measured)

    def factors(self, built: Built, measured: Tensor | None, strength: Strength, device: torch.device | str) -> Factors:
        """What the rotation at a strength multiplies with. measured: what ``measure`` gave. Raises ShapeError where it is missing."""
        return factors_of(self, built, measured, strength, device)

    # ---------------------------------------------------------------- plain state, for hosts that rebuild objects

    def to_state(self) -> tuple[tuple[Tensor | None, ...], tuple]:
        """(tensors, plain values) from which ``from_state`` rebuilds an equal object."""
        limit = self.constraint
        tensors = (
            self.generator, self.matrix, self.row_scale, self.col_scale, self.added, None if limit is None else limit.norm, self.of_layer,
            self.basis,
        )
        plain = (
            self.side, self.block, self.count, self.kind, self.terms, self.butterfly, self.clip, self.norm_of,
            self.memory_view, self.core_alpha, self.size,
            None if limit is None else (limit.family, limit.limit, limit.smooth), self.basis_of,
        )
        return tensors, plain

    @classmethod
    def from_state(cls, tensors: Sequence[Tensor | None], plain: Sequence) -> LayerRotation:
        generator, matrix, row_scale, col_scale, added, norm, of_layer, basis = tensors
        side, block, count, kind, terms, butterfly, clip, norm_of, memory_view, core_alpha, size, limit, basis_of = plain
        constraint = None if limit is None else Constraint(limit[0], limit[1], norm, limit[2])
        return cls(
            side, block, count, kind, terms, generator, matrix, butterfly, constraint, clip, row_scale, norm_of, col_scale,
            memory_view, core_alpha, size, added, of_layer, basis, basis_of,
        )
