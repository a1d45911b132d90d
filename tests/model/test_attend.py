"""The blocked attention equals scaled_dot_product_attention, forward and backward, under every mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muster.model.attend import attend, training_kernel, visible
from muster.model.blocks import BLOCK_ROWS, SHORT_BLOCK_ROWS


def reference(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None) -> Tensor:
    position = torch.arange(q.shape[2])
    seen = visible(position, position, window)[None, None]
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize("length", [1, 40, SHORT_BLOCK_ROWS, SHORT_BLOCK_ROWS + 10, 2 * BLOCK_ROWS + 44])
@pytest.mark.parametrize("window", [None, 1, 17, 200])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_blocked_equals_sdpa(length: int, window: int | None, packed: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, length, 16, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, length, 16, requires_grad=True) for _ in range(2))
    documents = torch.randint(0, 2, (2, length)).cumsum(1) // 9 if packed else None
    upstream = torch.randn(2, 6, length, 16)

    ours = attend(q, k, v, documents=documents, window=window)
    theirs = reference(q, k, v, documents, window)
    assert type(ours.grad_fn).__name__ == "BlockedAttentionBackward", (
        "the fast path must be the default on CPU"
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(theirs, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_without_gradients_the_masks_are_the_same(packed: bool) -> None:
    q, k, v = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    documents = torch.arange(50)[None].expand(2, -1) // 20 if packed else None
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, documents=documents), reference(q, k, v, documents, None))


def test_bf16_is_within_rounding() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 300, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    exact = reference(q.float(), k.float(), v.float(), None, None)
    torch.testing.assert_close(attend(q, k, v).float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("length", [512, 2049])
def test_the_printed_choice_is_the_kernel_that_runs(length: int) -> None:
    q, k, v = (torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3))
    kernel, reason = training_kernel(length, "cpu")
    blocked = type(attend(q, k, v).grad_fn).__name__ == "BlockedAttentionBackward"
    assert kernel == ("blocks of matrix products" if blocked else "scaled_dot_product_attention")
    assert reason
    assert training_kernel(length, "cuda")[0] == "scaled_dot_product_attention"
