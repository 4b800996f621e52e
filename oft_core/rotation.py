"""Generators and rotations: short pure functions on batches of small square blocks.

Everything here works on tensors (..., b, b) and keeps their dtype; callers choose float64 or float32. Conventions: ``q`` is a
skew-symmetric generator, ``cayley(q) = (I + q)(I - q)^-1``. In a plane where q has the eigenvalues +-i*lam, cayley turns by
2*atan(lam). None of the functions calls a batched LU (torch.linalg.inv / solve): with two CPU threads and blocks of 150 or more
those raise, hang or return wrong numbers (pytorch issues 141358, 142815); Cholesky and eigh do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def block_size_of(length: int) -> int | None:
    """Block size b with b(b-1)/2 == length, or None if there is none (a packed skew vector holds the strict upper triangle)."""
    b = (1 + math.isqrt(1 + 8 * length)) // 2
    return b if length > 0 and b * (b - 1) // 2 == length else None


@functools.lru_cache(32)
def _skew_places(b: int) -> Tensor:
    """Where each entry of a skew block (b*b,) stands in its packed vector, the same negated, and a zero."""
    i, j = torch.triu_indices(b, b, 1)
    n = len(i)
    places = torch.full((b, b), 2 * n)
    places[i, j], places[j, i] = torch.arange(n), torch.arange(n, 2 * n)
    return places.flatten()


def unpack_skew(v: Tensor, b: int) -> Tensor:
    """Packed (..., b(b-1)/2), the strict upper triangle row by row -> skew-symmetric (..., b, b)."""
    if v.dtype == torch.float32 and v.device.type == "cpu" and not (v.requires_grad and torch.is_grad_enabled()):
        # The same in a single pass; slower in float64, and backwards.
        flat = v.reshape(math.prod(v.shape[:-1]), v.shape[-1])  # a block of one row has no numbers
        signed = torch.cat([flat, -flat, flat.new_zeros(len(flat), 1)], 1)
        return signed.index_select(1, _skew_places(b)).view(*v.shape[:-1], b, b)
    i, j = torch.triu_indices(b, b, 1, device=v.device)
    upper = v.new_zeros(*v.shape[:-1], b * b).index_copy(-1, i * b + j, v).unflatten(-1, (b, b))
    return upper - upper.transpose(-1, -2)


def pack_skew(q: Tensor) -> Tensor:
    """Skew-symmetric (..., b, b) -> packed strict upper triangle (..., b(b-1)/2)."""
    b = q.shape[-1]
    i, j = torch.triu_indices(b, b, 1, device=q.device)
    # One list of places in flat blocks: reading by pairs of indices takes ten times as long.
    return q.reshape(-1, b * b).index_select(1, i * b + j).view(*q.shape[:-2], len(i))


def cayley(q: Tensor) -> Tensor:
    """Exact Cayley transform (I + q)(I - q)^-1 of skew q (..., b, b); orthogonal (Liu et al. 2023, arXiv 2306.07280).

    (I - q)^-1 = (I - q^2)^-1 (I + q) and I - q^2 = I + q^T q is positive definite, so one Cholesky factor does it.
    """
    gram = q.transpose(-1, -2) @ q
    gram.diagonal(dim1=-2, dim2=-1).add_(1)
    # _ex: no host synchronisation; the matrix is positive definite for every finite q, so there is nothing to check.
    factor, _ = torch.linalg.cholesky_ex(gram)
    right = q.clone()
    right.diagonal(dim1=-2, dim2=-1).add_(1)
    r = 2 * torch.cholesky_solve(right, factor)
    r.diagonal(dim1=-2, dim2=-1).sub_(1)
    return r


#: (largest lam^2, degree) of the polynomials that ``cayley_float`` starts from, for planes up to 41 and 90 degrees. The residual that
#: each leaves is below 8e-5, whose square is below the rounding.
_STARTS = ((1 / 7, 2), (1.0, 5))


@functools.cache
def _inverse_series(top: float, degree: int) -> tuple[float, ...]:
    """Coefficients c of the polynomial with the smallest largest |1 - (1 + x) sum c_k x^k| on [0, top].

    That residual is Chebyshev's T of one degree more on [0, top], scaled to 1 at x = -1 where 1 + x vanishes.
    """
    t = np.polynomial.Chebyshev.basis(degree + 1, domain=[0, top]).convert(kind=np.polynomial.Polynomial)
    rest = 1 - t / t(-1.0)
    quotient, _ = np.polynomial.polynomial.polydiv(rest.coef, [1.0, 1.0])
    return tuple(float(c) for c in quotient)


def cayley_float(q: Tensor) -> Tensor:
    """Float32 Cayley transform of skew q (n, b, b) float64, each entry as good as one rounded from float64 to about 1e-8; no gradient.

    On a CPU blocks of middle size whose planes all turn by less than 90 degrees are inverted by products of matrices alone: a
    polynomial of q^T q in float32, of a degree that goes with the angle, then one Newton step with a residual in float64, which
    squares the error. Others go through ``cayley``.
    """
    if q.device.type != "cpu" or not 16 <= q.shape[-1] <= 256:
        return cayley(q).float()
    small = q.float()
    gram = torch.bmm(small.transpose(1, 2), small)
    # Every lam^2 occurs twice among the eigenvalues, so the norm over sqrt(2) is none below the largest.
    square = torch.linalg.vector_norm(gram, dim=(1, 2)).numpy() / math.sqrt(2)
    start = np.searchsorted([0.999 * top for top, _ in _STARTS], square)
    if (start == start[0]).all():
        return _cayley_from(int(start[0]), q, small, gram)
    out = torch.empty_like(small)
    for i in np.unique(start):
        at = torch.from_numpy(np.flatnonzero(start == i))
        out[at] = _cayley_from(int(i), q[at], small[at], gram[at])
    return out


def _cayley_from(start: int, q: Tensor, small: Tensor, gram: Tensor) -> Tensor:
    """``cayley_float`` from one of the polynomials, or without any. small: q in float32; gram: q^T q in float32."""
    if start == len(_STARTS):
        return cayley(q).float()
    c = _inverse_series(*_STARTS[start])

    def line(i: int) -> Tensor:
        out = gram * c[i + 1]
        out.diagonal(dim1=1, dim2=2).add_(c[i])
        return out

    even = line(0)  # to be about (I + q^T q)^-1
    if len(c) == 3:
        even.baddbmm_(gram, gram, alpha=c[2])
    else:
        square = torch.bmm(gram, gram)
        even.baddbmm_(square, torch.baddbmm(line(2), square, line(4)))
    x = torch.baddbmm(even, small, even)  # about (I - q)^-1
    wide = x.double()
    rest = torch.baddbmm(wide, q, wide, beta=-1)
    rest.diagonal(dim1=1, dim2=2).add_(1)
    r = 2 * x
    r.diagonal(dim1=1, dim2=2).sub_(1)  # without rounding: these lie in [0, 1]
    return r.add_(torch.bmm(x, rest.float()), alpha=2)  # not in one call, which would round every partial sum


def neumann_coefficients(terms: int, old: bool = False) -> list[float]:
    """Coefficients of the truncated Cayley series as PEFT and OneTrainer compute it, lowest power first.

    New (PEFT >= 0.18, OneTrainer since 2025-11-15): 1, 2, ..., 2, 1 where three terms act as four. Old (PEFT 0.16-0.17): 1, 2, ..., 2.
    """
    if terms <= 1:
        return [1.0]
    if terms == 2:
        return [1.0, 2.0]
    if old:
        return [1.0] + [2.0] * (terms - 1)
    return [1.0] + [2.0] * (max(terms, 4) - 2) + [1.0]


def polynomial(q: Tensor, coefficients: list[float]) -> Tensor:
    """sum_k coefficients[k] q^k for q (..., b, b)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if coefficients == [1.0, 2.0, 2.0, 2.0, 1.0]:
        # 1 + 2q + 2q^2 + 2q^3 + q^4 = (1 + q)^2 (1 + q^2): one product less than Horner's rule.
        square = q @ q
        return (eye + 2 * q + square) @ (eye + square)
    out = coefficients[-1] * eye.expand_as(q)
    for c in reversed(coefficients[:-1]):
        out = out @ q + c * eye
    return out


@dataclass(frozen=True)
class Spectrum:
    """Invariant planes of a batch of normal matrices.

    vectors (..., b, b): orthonormal eigenvectors (columns) of a symmetric function of the matrix; or complex ones of the matrix itself.
    planes (..., b): one non-negative number per vector: lam of a generator, or the angle in radians of a finished rotation.
    turn (..., b, b): the skew operator that carries the direction of turning; its size in the plane is ``turn_size`` (..., b).
    Of complex vectors ``turn`` is empty, and ``turn_size`` the sense of turning, -1, 0 or 1.
    """

    vectors: Tensor
    planes: Tensor
    turn: Tensor
    turn_size: Tensor

    def double(self, device: torch.device | str) -> Spectrum:
        """The same on a device, as float64 (complex128)."""
        vectors = self.vectors.to(device, torch.complex128 if self.vectors.is_complex() else torch.float64)
        return Spectrum(vectors, *(t.to(device, torch.float64) for t in (self.planes, self.turn, self.turn_size)))

    def single(self) -> Spectrum:
        """The same to keep, as float32 (complex64), half the memory."""
        vectors = self.vectors.to(torch.complex64 if self.vectors.is_complex() else torch.float32)
        return Spectrum(vectors, *(t.float() for t in (self.planes, self.turn, self.turn_size)))

    def apply(self, real: Tensor, imaginary: Tensor) -> Tensor:
        """The matrix that acts as real + imaginary*J in each plane (J = quarter turn); real, imaginary (..., b) -> (..., b, b)."""
        if self.vectors.is_complex():
            scaled = self.vectors * torch.complex(real, -self.turn_size * imaginary).unsqueeze(-2)
            return (scaled @ self.vectors.mH).real
        back = self.vectors.transpose(-1, -2)
        even = (self.vectors * real.unsqueeze(-2)) @ back
        slope = imaginary / self.turn_size.clamp_min(torch.finfo(self.turn_size.dtype).tiny)
        # A plane that the operator does not turn has no direction; its imaginary part is zero as well.
        slope = torch.where(self.turn_size > 0, slope, torch.zeros_like(slope))
        return even + self.turn @ ((self.vectors * slope.unsqueeze(-2)) @ back)


def generator_spectrum(q: Tensor) -> Spectrum:
    """Planes of a skew generator (..., b, b): planes holds lam >= 0. Eigenvectors of q^T q, so no complex numbers."""
    values, vectors = torch.linalg.eigh(q.transpose(-1, -2) @ q)
    lam = values.clamp_min(0).sqrt()
    # Below the resolution of eigh the function value over lam is taken at a tiny lam instead of 0/0.
    floor = lam.amax(-1, keepdim=True) * 1e-7 + 1e-30
    lam = torch.maximum(lam, floor)
    return Spectrum(vectors, lam, q, lam)


def large_spectrum(q: Tensor) -> Spectrum:
    """``generator_spectrum`` for any size of lam, at twice the work: complex eigenvectors of iq.

    Those of q^T q mix planes whose lam differ much in size, and q then carries the large ones' share into the small ones.
    """
    values, vectors = torch.linalg.eigh(q * 1j)
    return Spectrum(vectors, values.abs(), q.new_zeros(*q.shape[:-2], 0), values.sign())


def rotation_spectrum(r: Tensor) -> Spectrum:
    """Planes of a finished rotation r (..., b, b): planes holds the angle in [0, pi]. At pi the direction is not defined."""
    cosine, vectors = torch.linalg.eigh(0.5 * (r + r.transpose(-1, -2)))
    angle = torch.acos(cosine.clamp(-1, 1)).clamp_min(1e-9)
    return Spectrum(vectors, angle, 0.5 * (r - r.transpose(-1, -2)), torch.sin(angle))


def polar(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m = U V diag(sigma) V^T with U orthogonal -> (U, V, sigma); shapes (..., b, b), (..., b, b), (..., b)."""
    left, sigma, right_t = torch.linalg.svd(m)
    return left @ right_t, right_t.transpose(-1, -2), sigma


def lambda_bounds(v: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Bounds low <= lam <= high of the largest lam of packed blocks (n, p) float32 -> two (n,) float64, mostly within a tenth.

    From power sums: lam^2 occurs twice among the eigenvalues of G = q^T q, so lam^4 <= |G|^2 / 2 and lam^8 <= |G^2|^2 / 2, and
    |G^2|^2 / |G|^2 <= lam^4. Two products of float32 matrices a block; the rounding is in the bounds.
    """
    norm = torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)
    middle = bool(norm.max() < 1e4) and bool(norm.min() > 1e-4)  # the eighth power fits into float32 as it is
    unit = torch.ones_like(norm) if middle else norm.clamp_min(1e-30)
    q = unpack_skew(v if middle else v / unit.unsqueeze(1).float(), b)
    gram = torch.bmm(q, q)  # the sign does not matter here
    first = torch.linalg.vector_norm(gram, dim=(1, 2)).double()
    second = torch.linalg.vector_norm(torch.bmm(gram, gram, out=q), dim=(1, 2)).double()
    slack = 1 + 4 * b**1.5 * 2.0**-24
    high = torch.minimum((second.square() / 2).pow(1 / 8) * unit * slack, norm * (1 + 1e-6))
    low = (second / first.clamp_min(1e-38)).sqrt() * unit / slack
    return low, high


def lambdas(q: Tensor) -> Tensor:
    """lam of every plane of skew blocks (..., b, b) -> (..., b) ascending; the last is the spectral norm."""
    return torch.linalg.eigvalsh(q.transpose(-1, -2) @ q).clamp_min(0).sqrt()


def orthogonality_error(m: Tensor) -> Tensor:
    """max |m^T m - I| of each block (..., b, b) -> (...,)."""
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    return (m.transpose(-1, -2) @ m - eye).abs().amax((-1, -2))


@dataclass(frozen=True)
class Transform:
    """How a dialect turns a generator into a matrix.

    matrix: q -> m, exactly as the trainer computes it. plane: lam >= 0 -> (gain, angle) of that matrix in the plane of lam.
    angle: lam -> the ideal angle in radians; lam_of_angle its inverse. exact: m is orthogonal for every q.
    """

    matrix: Callable[[Tensor], Tensor]
    plane: Callable[[Tensor], tuple[Tensor, Tensor]]
    angle: Callable[[Tensor], Tensor]
    lam_of_angle: Callable[[float], float]
    exact: bool


def _cayley_angle(lam: Tensor) -> Tensor:
    return 2 * torch.atan(lam)


def _cayley_lam(angle: float) -> float:
    return math.tan(min(angle, math.pi - 1e-6) / 2)


def _neumann_transform(terms: int, old: bool) -> Transform:
    coefficients = neumann_coefficients(terms, old)

    def plane(lam: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.zeros_like(lam, dtype=torch.complex128)
        point = 1j * lam.to(torch.complex128)
        for c in reversed(coefficients):
            z = z * point + c
        return z.abs().to(lam.dtype), z.angle().to(lam.dtype)

    return Transform(lambda q: polynomial(q, coefficients), plane, _cayley_angle, _cayley_lam, exact=False)


#: Norm of a generator above which the exact transforms are built from its planes: their errors grow with its square.
LARGE_LAM = 100.0


def matrices(name: str, terms: int, q: Tensor, large: bool) -> Tensor:
    """The transform's matrices of skew q (n, b, b) float64, in float64.   large: whether some lam may exceed ``LARGE_LAM``."""
    kind = transform(name, terms)
    if not (kind.exact and large):
        return kind.matrix(q)
    planes = large_spectrum(q)
    angle = kind.angle(planes.planes)
    return planes.apply(torch.cos(angle), torch.sin(angle))


def transform(name: str, terms: int = 5) -> Transform:
    """``cayley``, ``expm``, ``neumann`` or ``neumann_old`` (the last two with their number of terms) -> Transform."""
    if name == "cayley":
        return Transform(cayley, lambda lam: (torch.ones_like(lam), _cayley_angle(lam)), _cayley_angle, _cayley_lam, True)
    if name == "expm":
        return Transform(torch.linalg.matrix_exp, lambda lam: (torch.ones_like(lam), lam), lambda lam: lam, float, True)
    if name in ("neumann", "neumann_old"):
        return _neumann_transform(terms, name == "neumann_old")
    raise ValueError(f"unknown transform {name!r}")


def scaled_planes(kind: Transform, lam: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """Gain and angle per plane of the ``rotation`` rule (generator scaled by s), lam (..., b) at s = 1.

    Exact transforms: the transform of s*q. Series: the trainer's own polynomial of s*q while |s|*lam <= 0.5. Beyond that a series
    leaves the circle fast (it is singular at 90 degrees), so gain and angle run smoothly from there to the file's own values at
    s = 1 and the gain stays where it is beyond s = 1: exact at 0 and 1, continuous and bounded in between and outside.
    """
    size = abs(s)
    if kind.exact:
        gain, angle = kind.plane(size * lam)
        return gain, math.copysign(1, s) * angle
    knee = 0.5 / lam  # strength at which the plane leaves the safe range
    start_gain, start_angle = kind.plane(torch.full_like(lam, 0.5))
    end_gain, end_angle = kind.plane(lam)
    start_off = start_angle - kind.angle(torch.full_like(lam, 0.5))
    end_off = end_angle - kind.angle(lam)
    t = ((size - knee) / (1 - knee).clamp_min(1e-9)).clamp(0, 1)
    tiny = torch.finfo(lam.dtype).tiny
    between = torch.exp(torch.lerp(start_gain.clamp_min(tiny).log(), end_gain.clamp_min(tiny).log(), t))
    strong = lam > 0.5  # these leave the safe range before s = 1
    far_gain = torch.where(strong, between, start_gain)
    far_angle = kind.angle(size * lam) + torch.where(strong, torch.lerp(start_off, end_off, t), start_off)
    near_gain, near_angle = kind.plane(size * lam)
    near = size * lam <= 0.5
    sign = math.copysign(1, s)
    return torch.where(near, near_gain, far_gain), sign * torch.where(near, near_angle, far_angle)
