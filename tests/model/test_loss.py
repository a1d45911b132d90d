"""The chunked loss equals cross entropy over whole logits, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from muster.model.loss import IGNORED, linear_cross_entropy


@pytest.mark.parametrize("rows", [1, 511, 1300])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_equals_cross_entropy(rows: int, ignored: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 24, requires_grad=True)
    weight = torch.randn(97, 24, requires_grad=True)
    targets = torch.randint(0, 97, (rows,)).where(torch.rand(rows) >= ignored, IGNORED)
    ours = linear_cross_entropy(hidden, weight, targets)
    theirs = F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours / 7, (hidden, weight)),
        torch.autograd.grad(theirs / 7, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_bf16_loss_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 32).bfloat16(), (torch.randn(500, 32) * 0.1).bfloat16()
    targets = torch.randint(0, 500, (700,))
    ours = linear_cross_entropy(hidden, weight, targets)
    theirs = F.cross_entropy(hidden.float() @ weight.float().t(), targets, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_whole_logits_are_never_stored() -> None:
    hidden, weight = torch.randn(4096, 16, requires_grad=True), torch.randn(2048, 16, requires_grad=True)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long)).backward()
    assert max(sizes) <= 512 * 2048
