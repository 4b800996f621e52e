"""The canonical form of one adapted layer: what is stored, its matrix at a strength, and its application to a weight.

After reading, every dialect is this. Conventions: a rotation acts on the vectors along one axis of the weight as w' = M w. ``out``
means the rows of the flattened weight (out, in*kh*kw), so W' = M W; ``in`` its columns, so W' = W M^T. M is block diagonal with
blocks of ``block`` rows, or a product of such matrices with permutations between them (butterfly).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import blocks as multiply
from .constraint import Constraint, Strength
from .errors import ShapeError, StrengthError, ValueFault
from .rotation import (
    LARGE_LAM,
    Spectrum,
    cayley_float,
    generator_spectrum,
    lambda_bounds,
    lambdas,
    large_spectrum,
    matrices,
    orthogonality_error,
    polar,
    rotation_spectrum,
    scaled_planes,
    transform,
    unpack_skew,
)
from .threads import spread

#: Longest axis of a butterfly whose product is raised to a power: that takes one dense matrix and its eigenvectors.
LONGEST_PRODUCT = 2048
#: Norm of a generator from which on float64 no longer gives a rotation; training that works stays below 10.
LARGEST_LAM = 1e9
#: Numbers of other parts of a file from which on a weight at strength 2 may leave float32.
LARGEST_FACTOR = 1e9
#: Norm of a generator up to which real eigenvectors, kept in float32, give powers orthogonal to 1e-6.
_REAL_PLANES = 2.0
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
        """Length of the rotated axis."""
        return self.size or self.count * self.block

    @property
    def exact(self) -> bool:
        """Whether M is orthogonal at every strength of the rotation modes; where the last block is cut, all but that one are."""
        return self.kind in ("cayley", "expm")

    @property
    def needs_base_norm(self) -> bool:
        return self.norm_of == "base"

    @property
    def half_turn(self) -> bool:
        """Whether finished matrices turn a plane by 180 degrees or reflect: that has no direction, hence no power and no logarithm."""
        return self.kind == "matrix" and float(self.spectrum().planes.max()) > _AMBIGUOUS

    def rotated_length(self, shape: Sequence[int]) -> int:
        """Length of the axis that this rotation would act on in a weight of ``shape``."""
        rest = math.prod(shape[1:])
        if self.memory_view:
            return rest
        return shape[0] if self.side == "out" else rest

    def check_shape(self, shape: Sequence[int], *, module: str | None = None, file: str | None = None) -> None:
        """Raises ShapeError if the weight (or row slice) of ``shape`` cannot take this rotation."""
        found = self.rotated_length(shape)
        side = "output" if self.side == "out" else "input"
        if found != self.axis:
            raise ShapeError(
                f"The blocks do not fit the layer's {side} side", file=file, module=module,
                found=f"{self.count} blocks of {self.block} for a weight {tuple(shape)}, {side} size {found}",
                expected=f"{side} size {self.axis}", hint="The file was made for another model or layer width.",
            )
        if self.row_scale is not None and self.row_scale.numel() != shape[0]:
            raise ShapeError(
                "The row scale does not fit the layer", file=file, module=module,
                found=f"{self.row_scale.numel()} factors", expected=f"{shape[0]} output rows",
            )
        columns = shape[0] if self.memory_view else math.prod(shape[1:])
        if self.col_scale is not None and self.col_scale.numel() != columns:
            raise ShapeError(
                "The column scale does not fit the layer", file=file, module=module,
                found=f"{self.col_scale.numel()} factors", expected=f"{columns} columns",
            )

    def check_values(self, *, module: str | None = None, file: str | None = None) -> None:
        """Raises ValueFault if the stored numbers are finite but too large to make a rotation and factors of."""
        fault = None
        if self.generator is not None:
            size = self.lam_bound()
            if self.kind.startswith("neumann") and not _power(size, self.terms) < LARGEST_LAM and size < LARGEST_LAM:
                size = _power(self.series_lam(Strength()), self.terms)
            if not size < LARGEST_LAM:
                fault = f"a generator of norm {self.lam_bound():.3g}"
        for what, numbers in (("factors", self.row_scale), ("factors", self.col_scale), ("a difference", self.added), ("matrices", self.matrix)):
            if numbers is not None:
                fault = _too_large(what, numbers) or fault
        if fault is not None:
            raise ValueFault(
                "The file's numbers are too large", file=file, module=module, found=fault, expected="a rotation and finite factors",
                hint="The training run broke; use an earlier save.",
            )

    def rows_slice(self, start: int, length: int, *, module: str | None = None) -> LayerRotation:
        """The part of this rotation that acts on the output rows start ... start+length (a fused layer taken apart).

        Raises ShapeError if a block or a butterfly reaches over the cut.
        """
        if self.added is not None:
            raise ShapeError("A DoKr-OFT layer cannot be taken apart", module=module)
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

    # ---------------------------------------------------------------- generator, limits, planes

    def _dense(self, device: torch.device | str) -> Tensor:
        """Skew generator without any limit, float64 (stages, stored, b, b)."""
        return unpack_skew(self.generator.to(device, torch.float64), self.block)

    def _limit(self, strength: Strength, device: torch.device | str) -> Tensor:
        """Multiplier of the raw generator before the strength, float64, broadcastable to (stages, stored)."""
        if strength.mode == "core":
            return core_constraint(self).factor().to(device)
        one = torch.ones((), dtype=torch.float64, device=device)
        if strength.coft == "off" or self.kind == "matrix":
            return one
        if strength.coft == "hold" and strength.mode == "geodesic" and self.kind != "expm":
            return self._held_power(abs(strength.value)).to(device)
        held = abs(strength.value) if strength.coft == "hold" and strength.mode != "linear" else 1.0
        factor = one
        if self.constraint is not None:
            factor = self.constraint.factor(held).to(device)
        if self.clip is not None:
            lam = self.largest_lam(device) * held * factor
            factor = factor * (self.clip / lam.clamp_min(1e-30)).clamp_max(1.0)
        if isinstance(strength.coft, float):
            radians, s = torch.pi * strength.coft / 180, abs(strength.value)
            if strength.mode == "geodesic" and s:
                radians /= s  # the angle is multiplied, not the generator
            bound = transform(self.kind, self.terms).lam_of_angle(radians)
            scaled = s if strength.mode == "rotation" else 1.0
            lam = self.largest_lam(device) * factor * scaled
            factor = factor * (bound / lam.clamp_min(1e-30)).clamp_max(1.0)
        return factor

    def _held_power(self, s: float) -> Tensor:
        """Multiplier of the raw generator with which that of the power M^s, tan(s atan(lam)), keeps the file's limits.

        Found by halving, for a norm over many planes has no closed inverse. Float64, broadcastable to (stages, stored).
        """
        lam, limit = self.lam(), self.constraint
        factor = torch.ones((), dtype=torch.float64)
        if limit is not None:
            planes = (0, 2) if limit.norm.ndim else (0, 1, 2)
            if self.of_layer is not None and not limit.norm.ndim:
                lam = replace(self, generator=self.of_layer, of_layer=None, _cache={}).lam()
            # The trainers' norms are all proportional to the root of the planes' squares.
            share = limit.norm.double() / lam.square().sum(planes).sqrt().clamp_min(1e-30)
            low, high = torch.zeros_like(share), torch.ones_like(share)
            for _ in range(60):
                factor = (low + high) / 2
                power = torch.tan((s * torch.atan(lam * factor.unsqueeze(-1))).clamp_max(torch.pi / 2 - 1e-9))
                fits = power.square().sum(planes).sqrt() * share <= limit.limit
                low, high = torch.where(fits, factor, low), torch.where(fits, high, factor)
            factor = high  # 1 where nothing had to be limited
        if self.clip is not None:
            angle = min(math.atan(self.clip) / (s or 1.0), math.pi / 2 - 1e-9)
            factor = factor * (math.tan(angle) / (self.lam()[..., -1] * factor).clamp_min(1e-30)).clamp_max(1.0)
        return factor

    def lam(self) -> Tensor:
        """lam of every plane without limits (two equal values a plane), float64 (stages, stored, b), ascending. Cached."""
        if "lam" not in self._cache:
            parts = []
            for part in _portions(self.generator.flatten(0, 1), self.block):
                parts.append(lambdas(unpack_skew(part.double(), self.block)))
            self._cache["lam"] = torch.cat(parts).view(self.stages, self.stored, self.block)
        return self._cache["lam"]

    def lam_bound(self) -> float:
        """Upper bound of lam without limits, cheap: Frobenius norm over sqrt(2). Cached."""
        if "bound" not in self._cache:
            self._cache["bound"] = float(torch.linalg.vector_norm(self.generator, dim=-1).max()) * (1 + 1e-6)
        return self._cache["bound"]

    def series_lam(self, strength: Strength) -> float:
        """Largest lam with the limits of ``strength``, exact from 1 on; below 1 it may be an upper bound, which takes less work."""
        limit = self._limit(strength, "cpu").expand(self.stages, self.stored)
        if "lam" not in self._cache:
            rough = (torch.linalg.vector_norm(self.generator, dim=-1, dtype=torch.float64) * limit).max()
            if float(rough) >= 1:
                flat = [lambda_bounds(part, self.block)[1] for part in _portions(self.generator.flatten(0, 1), self.block)]
                rough = (torch.cat(flat).view_as(limit) * limit).max()
            if float(rough) < 1:
                return float(rough)
        return float((self.largest_lam() * limit).max())

    def largest_lam(self, device: torch.device | str = "cpu") -> Tensor:
        """Largest lam of every stored block without limits, float64 (stages, stored)."""
        return self.lam()[..., -1].to(device)

    def spectrum(self) -> Spectrum:
        """Planes of the unlimited generator, or of the orthogonal part of finished matrices; (stages, stored, ...). Cached."""
        if "spectrum" not in self._cache:
            if self.kind == "matrix":
                found = rotation_spectrum(self._polar()[0])
                # Close to a half turn the direction is a quotient of small numbers.
                self._cache["spectrum"] = found if float(found.planes.max()) > 2.8 else found.single()
            else:
                planes = generator_spectrum if self.lam_bound() <= _REAL_PLANES else large_spectrum
                parts = [planes(unpack_skew(p.double(), self.block)).single() for p in _portions(self.generator.flatten(0, 1), self.block)]
                self._cache["spectrum"] = Spectrum(
                    *(
                        torch.cat([getattr(p, name) for p in parts]).unflatten(0, (self.stages, self.stored))
                        for name in ("vectors", "planes", "turn", "turn_size")
                    )
                )
        return self._cache["spectrum"]

    def _polar(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Finished matrices as diag(rows) U (V diag(sigma) V^T): U, V, sigma, rows; float64. Cached.

        A rescale folded into the matrix shows as row norms away from 1 of an otherwise orthogonal matrix; a merely non-orthogonal
        matrix (additive dialect) keeps rows = 1.
        """
        if "polar" not in self._cache:
            m = self.matrix.double()
            rows = m.norm(dim=-1)
            gram = (m / rows.unsqueeze(-1).clamp_min(1e-30)) @ (m / rows.unsqueeze(-1).clamp_min(1e-30)).transpose(-1, -2)
            eye = torch.eye(self.block, dtype=m.dtype)
            folded = (gram - eye).abs().amax() < 2e-2 and (rows - 1).abs().amax() > 2e-3
            rows = rows if folded else torch.ones_like(rows)
            self._cache["polar"] = (*polar(m / rows.unsqueeze(-1)), rows)
        return self._cache["polar"]

    def angles(self, strength: Strength | None = None) -> Tensor:
        """Rotation angle in radians of every plane (stages, stored, b) at strength 1, limits applied as ``strength.coft`` says."""
        if self.kind == "matrix":
            return self.spectrum().planes.double()
        limit = self._limit(replace(strength or Strength(), value=1.0), "cpu").expand(self.stages, self.stored)
        return transform(self.kind, self.terms).angle(self.lam() * limit.unsqueeze(-1))

    def reach(self, strength: Strength) -> float:
        """Largest angle in radians of any plane at a strength (mode rotation or geodesic), limits applied."""
        s = abs(strength.value)
        if self.kind == "matrix":
            top = s * float(self.spectrum().planes.max())
            return min(top, torch.pi * strength.coft / 180) if isinstance(strength.coft, float) else top
        angle, lam = transform(self.kind, self.terms).angle, self.largest_lam() * self._limit(strength, "cpu")
        return float((s * angle(lam) if strength.mode == "geodesic" else angle(s * lam)).max())

    def orthogonality_error(self) -> float:
        """max |M^T M - I| over all blocks at strength 1. Cached."""
        if "error" not in self._cache:
            self._cache["error"] = float(orthogonality_error(self.build(Strength()).matrices.double()).max())
        return self._cache["error"]

    def as_core(self) -> bool:
        """Whether ComfyUI's own loader makes the same of this layer at strength 1, in exact arithmetic."""
        if self.core_alpha is None or self.row_scale is not None or self.col_scale is not None:
            return False
        own = torch.ones((), dtype=torch.float64) if self.constraint is None else self.constraint.factor()
        return torch.allclose(own, core_constraint(self).factor(), rtol=1e-6, atol=0.0)

    def check_strength(self, strength: Strength, *, module: str | None = None, file: str | None = None) -> None:
        """Raises StrengthError where the mode is not defined for this layer at this strength."""
        if strength.mode == "core" and self.core_alpha is None:
            raise StrengthError(
                "Mode 'core' repeats ComfyUI's own loader, which does not read this dialect", file=file, module=module,
                hint="Choose rotation, geodesic or linear.",
            )
        powers = strength.mode not in ("linear", "core") and strength.value not in (0.0, 1.0)
        product = strength.value != 0 and self._as_product(strength)
        if strength.value and (powers or _limited(self, strength)) and not product and self.half_turn:
            raise StrengthError(
                "A stored rotation turns by 180 degrees (or reflects), so only strengths 0 and 1 are defined, without a limit in degrees",
                file=file, module=module, found=f"strength {strength.value:g}, COFT {strength.coft}",
                hint="Use mode 'linear' for other strengths.",
            )
        if product:
            if self.axis > LONGEST_PRODUCT:
                raise StrengthError(
                    "Powers of a butterfly this long are not computed, since its product would be one dense matrix",
                    file=file, module=module, found=f"{self.axis} channels, strength {strength.value:g}, mode geodesic",
                    expected=f"at most {LONGEST_PRODUCT}", hint="Use mode 'rotation', which scales every factor's generator.",
                )
            return
        if powers and strength.value < 0 and self.kind == "matrix":
            sigma = self._polar()[2]
            if float(sigma.min()) <= 1e-6 * float(sigma.max()):
                raise StrengthError(
                    "A stored matrix has no inverse, so negative strengths are not defined", file=file, module=module,
                    found=f"strength {strength.value:g}", hint="Use mode 'linear' for negative strengths.",
                )
        if powers and self.kind.startswith("neumann") and self.lam_bound() >= 1:
            lam = self.series_lam(replace(strength, value=1.0))
            if lam >= 1:
                raise StrengthError(
                    "The Neumann series of this layer diverges, so only strengths 0 and 1 are defined",
                    file=file, module=module, found=f"strength {strength.value:g}, generator norm {lam:.3g}",
                    expected="a generator norm below 1", hint="Use mode 'linear' for other strengths.",
                )

    def built_bytes(self, mode: str) -> int:
        """Bytes that ``build`` gives in this mode, for planning."""
        if self.butterfly and mode == "geodesic":
            return 4 * self.axis**2
        return 4 * self.stages * self.stored * self.block**2

    # ---------------------------------------------------------------- matrices

    def build(self, strength: Strength, device: torch.device | str = "cpu") -> Built | None:
        """The matrices at a strength, float32 on ``device``; None at strength 0, where the weight stays as it is."""
        return build_all([self], strength, device)[0]

    def _planes(self, strength: Strength, device: torch.device | str) -> tuple[Spectrum, Tensor, Tensor]:
        """Invariant planes, and gain and angle of M in each of them at this strength; all float64, (stages, stored, b).

        Of finished matrices the planes of the orthogonal part; their stretching is not in the gain.
        """
        s = strength.value
        sp = self.spectrum().double(device)
        if self.kind == "matrix":
            angle = s * sp.planes
            if isinstance(strength.coft, float):
                top = angle.abs().amax(-1, keepdim=True)
                angle = angle * (torch.pi * strength.coft / 180 / top.clamp_min(1e-30)).clamp_max(1.0)
            return sp, torch.ones_like(angle), angle
        kind = transform(self.kind, self.terms)
        lam = sp.planes * self._limit(strength, device).expand(self.stages, self.stored).unsqueeze(-1)
        if strength.mode == "geodesic":
            gain, angle = kind.plane(lam)
            return sp, gain.pow(s), angle * s
        return sp, *scaled_planes(kind, lam, s)

    def _matrices_from_planes(self, strength: Strength, device: torch.device | str) -> Tensor:
        """M of every stage and stored block by its invariant planes, float64 (stages, stored, b, b)."""
        s = strength.value
        sp, gain, angle = self._planes(strength, device)
        turned = sp.apply(gain * torch.cos(angle), gain * torch.sin(angle))
        if self.kind != "matrix":
            return turned
        _, vectors, sigma, rows = (t.to(device) for t in self._polar())
        # M = D U P and its power D^s U^s P^s; the inverse order for negative s makes M(-s) M(s) = I.
        stretch = (vectors * sigma.pow(s).unsqueeze(-2)) @ vectors.transpose(-1, -2)
        rows = rows.pow(s)
        return rows.unsqueeze(-1) * (turned @ stretch) if s > 0 else (stretch @ turned) * rows.unsqueeze(-2)

    def logarithm(self, strength: Strength) -> Tensor:
        """log M of every stage and stored block at a strength, float64 (stages, stored, b, b); skew where M is orthogonal.

        strength: mode rotation or geodesic, for which ``check_strength`` passes. Row and column factors are not in it, nor is the
        stretching of a finished matrix that is not orthogonal. The angle is the one turned by, also above 180 degrees.
        """
        sp, gain, angle = self._planes(strength, "cpu")
        return sp.apply(gain.clamp_min(1e-30).log(), angle)

    def _as_product(self, strength: Strength) -> bool:
        """Whether the power of the whole product is wanted: R^s of a butterfly is not the product of its factors' powers."""
        return bool(self.butterfly) and strength.mode == "geodesic" and not _directly(self, strength)

    def _product_power(self, strength: Strength, device: torch.device | str) -> Tensor:
        """M^s of a butterfly multiplied out, limits applied, float64 (1, 1, axis, axis). Not kept: it is large.

        Raises StrengthError where the product turns a plane by 180 degrees.
        """
        coft = "file" if isinstance(strength.coft, float) else strength.coft
        if self.kind == "matrix":
            factors = self.matrix.double()
        else:
            held = Strength(strength.value if coft == "hold" else 1.0, "geodesic", coft)
            limit = self._limit(held, "cpu").expand(self.stages, self.stored)
            large = self.lam_bound() > LARGE_LAM
            raw = self._dense("cpu") * limit[..., None, None]
            factors = matrices(self.kind, self.terms, raw.flatten(0, 1), large).view_as(raw)
        m = torch.eye(self.axis, dtype=torch.float64)
        for i, factor in enumerate(factors):
            m = multiply.rotate(m, factor, multiply.butterfly_permutation(self.butterfly, i, self.block, self.axis))
        whole = LayerRotation(self.side, self.axis, 1, kind="matrix", matrix=m.float()[None, None])
        if self.exact:  # orthogonal already, so there is nothing to split off
            eye, ones = torch.eye(self.axis, dtype=torch.float64), torch.ones(1, 1, self.axis, dtype=torch.float64)
            whole._cache["polar"] = (m[None, None], eye[None, None], ones, ones)
        whole.check_strength(strength)
        return whole._matrices_from_planes(strength, device)

    # ---------------------------------------------------------------- application

    def apply_(
        self,
        weight: Tensor,
        strength: Strength,
        *,
        rotation: Built | None = None,
        base_row_norm: Tensor | None = None,
    ) -> None:
        """Apply to ``weight`` (out, ...) in place, block by block; float32 arithmetic, one rounding to the weight's dtype.

        weight: any floating dtype and device; a row slice of a larger tensor is fine. rotation: what ``build`` gave for the same
        strength, to save building it again. base_row_norm: (out,) norms of the unpatched rows, needed if ``needs_base_norm``.
        In the modes rotation and geodesic a negative strength undoes the positive one: M(-s) = M(s)^-1, row factors in reverse order.
        """
        built = rotation if rotation is not None else self.build(strength, weight.device)
        if built is None:
            return
        if self.added is not None:
            self._apply_added_(weight, strength, built)
            return
        self._multiply_(weight, built, self._row_factors(weight, base_row_norm), strength)

    def _apply_added_(self, weight: Tensor, strength: Strength, built: Built) -> None:
        """DoKr-OFT: rotate the sum of weight and difference. The only form that needs a full-size float32 copy."""
        s = strength.value
        delta = self.added.to(weight.device, torch.float32).reshape(weight.shape)
        if strength.mode == "linear":
            work = weight.float() + delta
            self._multiply_(work, built, self._row_factors(work, None), Strength())
            work = torch.lerp(weight.float(), work, s)
        else:
            work = torch.add(weight.float(), delta, alpha=s)
            self._multiply_(work, built, self._row_factors(work, None), strength)
        multiply.store_(weight, work)

    def _row_factors(self, weight: Tensor, base_row_norm: Tensor | None) -> Tensor | None:
        """Row factors at strength 1 for this weight, float32 (out,)."""
        current = self.row_scale is not None and self.norm_of == "current"
        return self.row_factors(multiply.row_norms(weight) if current else base_row_norm, weight.device)

    def row_factors(self, norm: Tensor | None, device: torch.device | str) -> Tensor | None:
        """Row factors at strength 1, float32 (out,) on ``device``; None without any.

        norm: (out,) the row norms that ``norm_of`` asks for. Raises ShapeError if they are needed and absent.
        """
        if self.row_scale is None:
            return None
        rows = self.row_scale.to(device, torch.float32)
        if self.norm_of:
            if norm is None:
                raise ShapeError("The row norms of the unpatched weight are needed for this layer (dora_scale)")
            rows = rows / norm.to(device, torch.float32).clamp_min(1e-12)
        return rows

    def _multiply_(self, weight: Tensor, built: Built, rows: Tensor | None, strength: Strength) -> None:
        f = self.factors(built, rows, strength, weight.device)
        multiply.transform_(
            weight, f.stages, side=self.side, count=f.count, permutations=f.permutations, rows=f.rows, cols=f.cols, mix=f.mix,
            inverse=f.inverse, memory_view=self.memory_view,
        )

    def factors(self, built: Built, rows: Tensor | None, strength: Strength, device: torch.device | str) -> Factors:
        """What the rotation at a strength multiplies with. rows: the factors at strength 1 of ``row_factors``."""
        s, mode = strength.value, strength.mode
        cols = None if self.col_scale is None else self.col_scale.to(device, torch.float32)
        matrices = built.matrices.to(device)
        stages = [matrices[i] for i in built.order]
        mix: float | None = None
        inverse = False
        if mode == "core":
            mix = s if self.butterfly else s * s
            if self.butterfly:
                eye = torch.eye(self.block, device=device)
                stages = [torch.lerp(eye.expand_as(m), m, s) for m in stages]
            else:
                rows = cols = None
        elif mode == "linear":
            mix = None if s == 1 else s
        else:
            rows, cols = powered(rows, s), powered(cols, s)
            inverse = s < 0
        index: list[Tensor | None] | None = None
        count = self.count
        if built.product:
            count = 1
        elif self.butterfly:
            index = [multiply.butterfly_permutation(self.butterfly, i, self.block, self.axis, device) for i in built.order]
        return Factors(stages, index, rows, cols, mix, inverse, count)

    # ---------------------------------------------------------------- plain state, for hosts that rebuild objects

    def to_state(self) -> tuple[tuple[Tensor | None, ...], tuple]:
        """(tensors, plain values) from which ``from_state`` rebuilds an equal object."""
        limit = self.constraint
        tensors = (
            self.generator, self.matrix, self.row_scale, self.col_scale, self.added, None if limit is None else limit.norm, self.of_layer,
        )
        plain = (
            self.side, self.block, self.count, self.kind, self.terms, self.butterfly, self.clip, self.norm_of,
            self.memory_view, self.core_alpha, self.size,
            None if limit is None else (limit.family, limit.limit, limit.smooth),
        )
        return tensors, plain

    @classmethod
    def from_state(cls, tensors: Sequence[Tensor | None], plain: Sequence) -> LayerRotation:
        generator, matrix, row_scale, col_scale, added, norm, of_layer = tensors
        side, block, count, kind, terms, butterfly, clip, norm_of, memory_view, core_alpha, size, limit = plain
        constraint = None if limit is None else Constraint(limit[0], limit[1], norm, limit[2])
        return cls(
            side, block, count, kind, terms, generator, matrix, butterfly, constraint, clip, row_scale, norm_of, col_scale,
            memory_view, core_alpha, size, added, of_layer,
        )


@dataclass(frozen=True)
class Built:
    """Matrices of one layer at one strength: ``matrices`` (stages, n or 1, b, b) float32, in the order in which they act."""

    matrices: Tensor
    #: Stage numbers in acting order: ascending, or descending for an inverse.
    order: tuple[int, ...]
    #: One dense matrix over the whole axis instead of a butterfly's factors.
    product: bool = False


@dataclass(frozen=True)
class Factors:
    """One rotation at one strength as plain numbers, in the terms of ``blocks.transform_``."""

    stages: list[Tensor]
    permutations: list[Tensor | None] | None
    rows: Tensor | None
    cols: Tensor | None
    mix: float | None
    inverse: bool
    count: int


@dataclass(frozen=True)
class Diff:
    """An additive difference (``.diff`` of a weight, ``.diff_b`` of a bias), linear in the strength in every mode.

    whole: ``delta`` is the new value itself, as PEFT stores it; the difference is then to the value that is found.
    """

    delta: Tensor
    needs_base_norm: bool = False
    whole: bool = False

    def build(self, strength: Strength, device: torch.device | str = "cpu") -> None:
        return None

    def check_shape(self, shape: Sequence[int], *, module: str | None = None, file: str | None = None) -> None:
        """Raises ShapeError if the difference has another number of rows or values than the parameter."""
        # A 1x1 convolution's difference may come as a matrix, but rows stay rows.
        if math.prod(shape) != self.delta.numel() or self.delta.shape[:1] != torch.Size(shape[:1]) and self.delta.numel() > 1:
            raise ShapeError(
                "An additive difference does not fit the parameter", file=file, module=module,
                found=tuple(self.delta.shape), expected=tuple(shape),
            )

    def check_strength(self, strength: Strength, *, module: str | None = None, file: str | None = None) -> None:
        return None

    def check_values(self, *, module: str | None = None, file: str | None = None) -> None:
        """Raises ValueFault if the numbers are finite but too large for a weight."""
        fault = _too_large("a difference", self.delta)
        if fault is not None:
            raise ValueFault(
                "The file's numbers are too large", file=file, module=module, found=fault, expected="a difference of weights",
                hint="The training run broke; use an earlier save.",
            )

    def rows_slice(self, start: int, length: int, *, module: str | None = None) -> Diff:
        """The part for the output rows start ... start+length."""
        return replace(self, delta=self.delta[start : start + length])

    def apply_(self, weight: Tensor, strength: Strength, *, rotation: None = None, base_row_norm: Tensor | None = None) -> None:
        """weight += s * delta, or s * (delta - weight) for whole values, in place, float32 arithmetic."""
        delta = self.delta.to(weight.device, torch.float32).reshape(weight.shape)
        if self.whole:
            changed = torch.lerp(weight.float(), delta, strength.value)
        else:
            changed = torch.add(weight.float(), delta, alpha=strength.value)
        multiply.store_(weight, changed)

    def to_state(self) -> tuple[tuple[Tensor | None, ...], tuple]:
        return (self.delta,), ("diff", self.whole)

    @classmethod
    def from_state(cls, tensors: Sequence[Tensor | None], plain: Sequence) -> Diff:
        return cls(tensors[0], whole=plain[1])


def powered(factors: Tensor | None, s: float) -> Tensor | None:
    """Row or column factors at strength s in the rotation modes: m^s, or 1 + s(m - 1) for a factor that is not positive."""
    if factors is None:
        return None
    # The bounds keep the square of a factor, and its inverse, inside float32.
    return torch.where(factors > 0, factors.clamp(1e-15, 1e15).pow(s), 1 + s * (factors - 1))


def _power(lam: float, terms: int) -> float:
    """Size of the largest term of a series, which has powers of lam up to terms - 1; bounded."""
    return lam if lam < 1 or lam > 1e300 else 10 ** min(math.log10(lam) * (terms - 1), 300)


def _too_large(what: str, numbers: Tensor) -> str | None:
    """What is wrong with factors, differences or matrices that no weight can take; None if nothing is."""
    low, high = (float(x) for x in torch.aminmax(numbers)) if numbers.numel() else (0.0, 0.0)
    if low >= -LARGEST_FACTOR and high <= LARGEST_FACTOR:
        return None
    size = max(-low, high)
    return f"{what} of size {size:.3g}" if math.isfinite(size) else f"{what} that are not finite"


def _part_size(block: int, device: torch.device) -> int:
    """Blocks whose float64 matrices fill 1 MiB on a CPU (its cache), 64 MiB elsewhere."""
    return max(1, (1 << 17 if device.type == "cpu" else 1 << 23) // (block * block))


def _portions(flat: Tensor, block: int) -> list[Tensor]:
    """Split (blocks, ...) into parts of that size."""
    return list(flat.split(_part_size(block, flat.device)))


def core_constraint(layer: LayerRotation) -> Constraint:
    """ComfyUI's limit: the norm of all blocks against the raw alpha; zero or absent alpha means none."""
    alpha = layer.core_alpha
    norm = (layer.generator if layer.of_layer is None else layer.of_layer).double().norm() * 2**0.5
    return Constraint("ComfyUI core, raw alpha", alpha if alpha and alpha > 0 else float("inf"), norm)


def _limited(layer: LayerRotation, strength: Strength) -> bool:
    """Whether a limit in degrees has to be put on finished matrices, or on the product of a butterfly's factors."""
    product = layer.butterfly and strength.mode == "geodesic"
    return (layer.kind == "matrix" or bool(product)) and isinstance(strength.coft, float) and strength.coft < 180


def _directly(layer: LayerRotation, strength: Strength) -> bool:
    """Whether M comes from the trainer's own formula rather than from invariant planes."""
    if strength.mode in ("linear", "core") or strength.value == 1:
        return not _limited(layer, strength)
    if layer.kind == "matrix" or strength.mode == "geodesic":
        return False
    # A series inside its safe range is the polynomial of the scaled generator, the same number for less work.
    return layer.exact or abs(strength.value) * layer.lam_bound() <= 0.5


def build_all(layers: Sequence, strength: Strength, device: torch.device | str = "cpu") -> list[Built | None]:
    """Matrices of many layers at one strength, batched over all layers of one block size and kind.

    layers: LayerRotation (or Diff, which gives None). Returns one entry per layer, None at strength 0. Float64 inside, float32 out;
    devices without float64 build on the CPU.
    """
    out: list[Built | None] = [None] * len(layers)
    if strength.value == 0:
        return out
    target = torch.device(device)
    where = torch.device("cpu") if target.type in ("mps", "privateuseone", "meta") else target
    scaled = strength.value if strength.mode == "rotation" else 1.0
    groups: dict[tuple, list[tuple[int, int]]] = {}
    pieces: list[list[int]] = []
    for i, layer in enumerate(layers):
        if isinstance(layer, Diff):
            continue
        if _directly(layer, strength) and layer.kind != "matrix":
            large = layer.exact and layer.lam_bound() * abs(scaled) > LARGE_LAM
            groups.setdefault((layer.block, layer.kind, layer.terms, large), []).append((i, layer.stages * layer.stored))
        else:
            pieces.append([i])
    for (block, *_), members in groups.items():
        pieces += _runs(members, _part_size(block, where))

    def work(left: Iterator[list[int]]) -> None:
        for piece in left:
            first = layers[piece[0]]
            if _directly(first, strength) and first.kind != "matrix":
                made = _build_together([layers[i] for i in piece], strength, scaled, where)
            else:
                made = [_build_alone(first, strength, where)]
            for i, (m, product) in zip(piece, made, strict=True):
                out[i] = Built(m.to(target, torch.float32), (0,), True) if product else _built(layers[i], m, strength, target)

    spread(work, pieces, where)
    return out


def _build_alone(layer: LayerRotation, strength: Strength, device: torch.device) -> tuple[Tensor, bool]:
    """Matrices of a layer that does not come from its trainer's formula, and whether they are one product of a butterfly."""
    if layer._as_product(strength):
        return layer._product_power(strength, device), True
    if layer.kind == "matrix" and _directly(layer, strength):
        return layer.matrix.to(device), False
    # In mode linear the strength mixes weights afterwards; the matrix is that of strength 1.
    at = replace(strength, value=1.0) if strength.mode == "linear" else strength
    return layer._matrices_from_planes(at, device), False


def _build_together(
    layers: Sequence[LayerRotation], strength: Strength, scaled: float, device: torch.device
) -> list[tuple[Tensor, bool]]:
    """Float32 matrices of layers of one block size and kind, by their trainer's formula of the generator times ``scaled``."""
    block, kind, terms = layers[0].block, layers[0].kind, layers[0].terms
    large = layers[0].exact and layers[0].lam_bound() * abs(scaled) > LARGE_LAM
    limit = [(op._limit(strength, device) * scaled).expand(op.stages, op.stored).reshape(-1, 1, 1) for op in layers]
    packed = [op.generator.to(device).flatten(0, 1) for op in layers]
    flat, scale = (t[0] if len(t) == 1 else torch.cat(t) for t in (packed, limit))
    result = torch.empty(flat.shape[0], block, block, dtype=torch.float32, device=device)
    # In parts that fit the cache, so that the float64 copies stay small.
    for v, by, into in zip(*(t.split(_part_size(block, device)) for t in (flat, scale, result)), strict=True):
        q = unpack_skew(v, block).double().mul_(by)
        into.copy_(cayley_float(q) if kind == "cayley" and not large else matrices(kind, terms, q, large))
    parts = result.split([op.stages * op.stored for op in layers])
    return [(m.view(op.stages, op.stored, block, block), False) for op, m in zip(layers, parts, strict=True)]


def _runs(sizes: Sequence[tuple[int, int]], most: int) -> list[list[int]]:
    """Neighbours (index, size) joined to runs of at most ``most`` in all; a larger one stands alone."""
    runs: list[list[int]] = []
    room = 0
    for i, size in sizes:
        if size > room:
            runs.append([])
            room = most
        runs[-1].append(i)
        room -= size
    return runs


def _built(layer: LayerRotation, m: Tensor, strength: Strength, device: torch.device) -> Built:
    order = tuple(range(layer.stages))
    if strength.value < 0 and strength.mode in ("rotation", "geodesic"):
        order = order[::-1]
    return Built(m.to(device, torch.float32), order)
