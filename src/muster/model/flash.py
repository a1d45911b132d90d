"""Flash attention on GPUs with the log-sum-exp, which torch's public attention does not return.

The only place with these two private operators. They are what `scaled_dot_product_attention` itself calls, and
`torch.nn.attention` offers no function that gives the log-sum-exp or takes one for the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention


def fits(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel takes q (B, H, T, D) and k (B, K, S, D): GPU, dtype, head dim."""
    if q.device.type != "cuda" or q.shape[-1] % 8:
        return False
    return can_use_flash_attention(SDPAParams(q, k, k, None, 0.0, False, q.shape[1] != k.shape[1]))


def forward(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """The output (B, H, T, D) and, in fp32, its log-sum-exp (B, H, T)."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the output and log-sum-exp over all the keys of which k is a part."""
    lse = lse.contiguous()  # the kernel takes no strides for it
    # Seed and offset of a dropout that there is not.
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    offset = torch.empty((), dtype=torch.uint64, device=q.device)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal, seed, offset
    )
    return grads
