"""The differentiable steps from trained numbers to a layer's output, each with its own backward pass."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..rotation import cayley, lambdas, pack_skew, unpack_skew
from .config import OFTConfig


class CayleyOfPacked(torch.autograd.Function):
    """Packed skew vectors (n, b(b-1)/2) -> exact Cayley rotations (n, b, b), with the closed-form derivative.

    With R = (I + Q)(I - Q)^-1 and a gradient G of R: dL/dQ = (I + R)^T G (I + R)^T / 2. Only R is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, packed: Tensor, block: int) -> Tensor:
        out = packed.new_empty(packed.shape[0], block, block)
        # In parts: the temporaries of one part stay in a CPU's cache, and small on a GPU.
        numbers = 1 << 17 if packed.device.type == "cpu" else 1 << 23
        step = max(1, numbers // (block * block))
        for i in range(0, len(packed), step):
            out[i : i + step] = cayley(unpack_skew(packed[i : i + step], block))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (r,) = ctx.saved_tensors
        eye = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
        left = (eye + r).transpose(-1, -2)
        q = 0.5 * (left @ grad @ left)
        return pack_skew(q - q.transpose(-1, -2)), None


class RotateLast(torch.autograd.Function):
    """x (..., n*b) -> each run of b numbers times its block: out = x M, m (n, b, b), or (1, b, b) for all runs.

    Computed in ``dtype``. For the backward pass x itself is kept (no cast or rearranged copy), so several layers that rotate the
    same x share it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, m: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, m)
        with no_autocast(x.device):
            return _times_blocks(x.to(dtype), m.to(dtype)).view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, m = ctx.saved_tensors
        gx = gm = None
        with no_autocast(x.device):
            if ctx.needs_input_grad[0]:
                gx = _times_blocks(grad, m.to(grad.dtype).transpose(-1, -2)).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                b = m.shape[-1]
                n = 1 if m.shape[0] == 1 else x.shape[-1] // b
                left = x.to(grad.dtype).reshape(-1, n, b).permute(1, 2, 0)
                gm = torch.bmm(left, grad.reshape(-1, n, b).transpose(0, 1)).to(m.dtype)
        return gx, gm, None


def _times_blocks(x: Tensor, m: Tensor) -> Tensor:
    """x (..., n*b) times m (n or 1, b, b) run by run, as (tokens, n*b); written in place of the result, without a transposed copy."""
    b = m.shape[-1]
    if m.shape[0] == 1:
        return (x.reshape(-1, b) @ m[0]).view(-1, x.shape[-1])
    flat = x.reshape(-1, m.shape[0], b)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    torch.bmm(flat.transpose(0, 1), m, out=out.transpose(0, 1))
    return out.flatten(1)


def rotate_channels(y: Tensor, m: Tensor) -> Tensor:
    """y (batch, n*b, ...) with its channels as vectors: out = M y, m (n or 1, b, b) in y's dtype."""
    b = m.shape[-1]
    blocks = y.reshape(y.shape[0], -1, b, y[0, 0].numel())
    return torch.matmul(m, blocks).reshape(y.shape)


class RotatedConv(torch.autograd.Function):
    """Convolution with the kernel W M^T, W (out, ...) frozen and flattened, m (n or 1, b, b) on its columns; no bias.

    The rotated kernel is made again in the backward pass instead of being kept: it costs little and is as large as the layer.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, m: Tensor, dtype: torch.dtype, stride, padding, dilation) -> Tensor:
        ctx.save_for_backward(x, weight, m)
        ctx.how = (stride, padding, dilation)
        with no_autocast(x.device):
            kernel = RotatedConv._kernel(weight, m).to(dtype)
            return torch.convolution(x.to(dtype), kernel, None, stride, padding, dilation, False, [0] * len(stride), 1)

    @staticmethod
    def _kernel(weight: Tensor, m: Tensor) -> Tensor:
        flat = weight.to(m.dtype).flatten(1)
        return _times_blocks(flat, m.transpose(-1, -2)).view(weight.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, m = ctx.saved_tensors
        stride, padding, dilation = ctx.how
        with no_autocast(x.device):
            kernel = RotatedConv._kernel(weight, m).to(grad.dtype)
            wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], False]
            gx, gk, _ = torch.ops.aten.convolution_backward(
                grad, x.to(grad.dtype), kernel, None, stride, padding, dilation, False, [0] * len(stride), 1, wanted
            )
            gm = None
            if gk is not None:
                b = m.shape[-1]
                n = 1 if m.shape[0] == 1 else weight[0].numel() // b
                # W' = W M^T per block, so dL/dM = (dL/dW')^T W.
                left = gk.to(m.dtype).reshape(-1, n, b).permute(1, 2, 0)
                gm = torch.bmm(left, weight.to(m.dtype).reshape(-1, n, b).transpose(0, 1))
        return None if gx is None else gx.to(x.dtype), None, gm, None, None, None, None


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off, if it is on for this kind of device."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def plain(t: Tensor) -> Tensor:
    """The tensor without gradient and without a class of its own, such as GGUF loaders give their parameters."""
    return t.detach() if type(t) in (Tensor, nn.Parameter) else t.as_subclass(Tensor).detach()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer works on x: autocast's where that is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


def generator_scale(config: OFTConfig, block: int) -> float:
    """Factor from a stored parameter to the generator: 1, or 1 / (2 sqrt(b-1)) of the scaled form."""
    return 1 / (2 * math.sqrt(block - 1)) if config.scaled else 1.0


def limit_lam_(packed: Tensor, limit: float, block: int) -> None:
    """Scale blocks (n, b(b-1)/2) down in place so that no singular value of their skew matrix exceeds ``limit``.

    Cheap upper bounds first: lam^2 <= sum of squares, lam^4 <= |Q^T Q|_F^2 / 2; only blocks beyond both get an eigenvalue solve.
    """
    suspects = torch.nonzero(packed.norm(dim=1) > limit).flatten()
    if suspects.numel() == 0:
        return
    q = unpack_skew(packed[suspects], block)
    fourth = (q.transpose(-1, -2) @ q).square().sum((-1, -2)) / 2
    near = fourth > limit**4
    suspects = suspects[near]
    if suspects.numel() == 0:
        return
    lam = lambdas(q[near].double() if packed.device.type != "mps" else q[near])[:, -1].to(packed.dtype)
    packed[suspects] *= (limit / lam.clamp_min(limit)).unsqueeze(1)
