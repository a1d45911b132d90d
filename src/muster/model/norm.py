"""RMSNorm (Zhang & Sennrich 2019), with statistics and sums in fp32 whatever the type of its input.

On a GPU torch has one kernel for it. On CPU it is put together from a dozen passes over the
activations, most of them in the backward pass; in training the formulas here need half of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim of x (..., E), weight (E,); the type of x."""
    if x.device.type == "cpu" and torch.is_grad_enabled():
        out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (..., 1)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)  # in fp32 up to here

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        E = x.shape[-1]
        rows, grad = x.reshape(-1, E).float(), grads[0].reshape(-1, E).float()  # (N, E)
        inverse, scale = inverse.reshape(-1, 1), weight.float()
        # Both sums are taken by matrix-vector products, which read their operand once.
        product = rows * grad
        grad_weight = torch.mv(product.t(), inverse[:, 0])
        along_x = torch.mv(product, scale)[:, None] * inverse.pow(3) / E
        grad_x = torch.mul(grad, scale, out=product).mul_(inverse).addcmul_(rows, along_x, value=-1)
        return grad_x.to(x.dtype).view(x.shape), grad_weight.to(weight.dtype), None
