"""What a layer's numbers, a weight's shape and a strength have to be, and the errors that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .build import as_product
from .constraint import Strength
from .diff import too_large
from .errors import ShapeError, StrengthError, ValueFault
from .limits import limits_product, series_lam
from .spectra import lam_bound, polar_of

if TYPE_CHECKING:
    from .layer import LayerRotation

#: Longest axis of a butterfly whose product is raised to a power: that takes one dense matrix and its eigenvectors.
LONGEST_PRODUCT = 2048
#: Norm of a generator from which on float64 no longer gives a rotation; training that works stays below 10.
LARGEST_LAM = 1e9


def check_shape(layer: LayerRotation, shape: Sequence[int], *, module: str | None = None, file: str | None = None) -> None:
    """Raises ShapeError if the weight (or row slice) of ``shape`` cannot take this rotation."""
    found = layer.rotated_length(shape)
    side = "output" if layer.side == "out" else "input"
    if layer.subspace:
        _check_subspace(layer, shape, found, module, file)
        return
    if found != layer.axis:
        raise ShapeError(
            f"The blocks do not fit the layer's {side} side", file=file, module=module,
            found=f"{layer.count} blocks of {layer.block} for a weight {tuple(shape)}, {side} size {found}",
            expected=f"{side} size {layer.axis}", hint="The file was made for another model or layer width.",
        )
    if layer.row_scale is not None and layer.row_scale.numel() != shape[0]:
        raise ShapeError(
            "The row scale does not fit the layer", file=file, module=module,
            found=f"{layer.row_scale.numel()} factors", expected=f"{shape[0]} output rows",
        )
    columns = shape[0] if layer.memory_view else math.prod(shape[1:])
    if layer.col_scale is not None and layer.col_scale.numel() != columns:
        raise ShapeError(
            "The column scale does not fit the layer", file=file, module=module,
            found=f"{layer.col_scale.numel()} factors", expected=f"{columns} columns",
        )


def _check_subspace(layer: LayerRotation, shape: Sequence[int], found: int, module: str | None, file: str | None) -> None:
    if layer.basis_of is not None and (len(shape) != 2 or layer.block > min(shape)):
        raise ShapeError(
            "The weight has no principal subspace of this size", file=file, module=module, found=f"a weight {tuple(shape)}",
            expected=f"a matrix with {layer.block} or more rows and columns", hint="The file was made for another model or layer width.",
        )
    if layer.basis is not None and found != layer.axis:
        raise ShapeError(
            "The reflections do not fit the layer's input side", file=file, module=module, found=f"a weight {tuple(shape)}, input size {found}",
            expected=f"input size {layer.axis}", hint="The file was made for another model or layer width.",
        )


def check_values(layer: LayerRotation, *, module: str | None = None, file: str | None = None) -> None:
    """Raises ValueFault if the stored numbers are finite but too large to make a rotation and factors of."""
    fault = None
    if layer.generator is not None:
        size = lam_bound(layer)
        if layer.kind.startswith("neumann") and not _power(size, layer.terms) < LARGEST_LAM and size < LARGEST_LAM:
            size = _power(series_lam(layer, Strength()), layer.terms)
        if not size < LARGEST_LAM:
            fault = f"a generator of norm {lam_bound(layer):.3g}"
    for what, numbers in (("factors", layer.row_scale), ("factors", layer.col_scale), ("a difference", layer.added), ("matrices", layer.matrix)):
        if numbers is not None:
            fault = too_large(what, numbers) or fault
    if fault is not None:
        raise ValueFault(
            "The file's numbers are too large", file=file, module=module, found=fault, expected="a rotation and finite factors",
            hint="The training run broke; use an earlier save.",
        )


def check_strength(layer: LayerRotation, strength: Strength, *, module: str | None = None, file: str | None = None) -> None:
    """Raises StrengthError where the mode is not defined for this layer at this strength."""
    if strength.mode == "core" and layer.core_alpha is None:
        raise StrengthError(
            "Mode 'core' repeats ComfyUI's own loader, which does not read this dialect", file=file, module=module,
            hint="Choose rotation, geodesic or linear.",
        )
    powers = strength.mode not in ("linear", "core") and strength.value not in (0.0, 1.0)
    product = strength.value != 0 and as_product(layer, strength)
    if strength.value and (powers or limits_product(layer, strength)) and not product and layer.half_turn:
        raise StrengthError(
            "A stored rotation turns by 180 degrees (or reflects), so only strengths 0 and 1 are defined, without a limit in degrees",
            file=file, module=module, found=f"strength {strength.value:g}, COFT {strength.coft}",
            hint="Use mode 'linear' for other strengths.",
        )
    if product:
        if layer.axis > LONGEST_PRODUCT:
            raise StrengthError(
                "Powers of a butterfly this long are not computed, since its product would be one dense matrix",
                file=file, module=module, found=f"{layer.axis} channels, strength {strength.value:g}, mode geodesic",
                expected=f"at most {LONGEST_PRODUCT}", hint="Use mode 'rotation', which scales every factor's generator.",
            )
        return
    if powers and strength.value < 0 and layer.kind == "matrix":
        sigma = polar_of(layer)[2]
        if float(sigma.min()) <= 1e-6 * float(sigma.max()):
            raise StrengthError(
                "A stored matrix has no inverse, so negative strengths are not defined", file=file, module=module,
                found=f"strength {strength.value:g}", hint="Use mode 'linear' for negative strengths.",
            )
    if powers and layer.kind.startswith("neumann") and lam_bound(layer) >= 1:
        lam = series_lam(layer, replace(strength, value=1.0))
        if lam >= 1:
            raise StrengthError(
                "The Neumann series of this layer diverges, so only strengths 0 and 1 are defined",
                file=file, module=module, found=f"strength {strength.value:g}, generator norm {lam:.3g}",
                expected="a generator norm below 1", hint="Use mode 'linear' for other strengths.",
            )


def _power(lam: float, terms: int) -> float:
    """Size of the largest term of a series, which has powers of lam up to terms - 1; bounded."""
    return lam if lam < 1 or lam > 1e300 else 10 ** min(math.log10(lam) * (terms - 1), 300)
