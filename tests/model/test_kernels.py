"""The short CPU formulas of RMSNorm and of the rotation equal the plain ones, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from muster.model.norm import rms_norm
from muster.model.rope import rotate

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Relative to the largest element: a few roundings of the type."""


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def assert_equal_within(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    found, exact = found.detach().double(), exact.detach()
    assert float((found - exact).abs().max() / exact.abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 24), (2, 7, 3, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, upstream = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = (torch.rand(shape[-1]) + 0.5).to(dtype)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    theirs = F.rms_norm(exact[0], (shape[-1],), exact[1], 1e-5)
    ours = rms_norm(*inputs, 1e-5)
    assert type(ours.grad_fn).__name__ == "_RMSNormBackward", "the fast path must be the default on CPU"
    assert_equal_within(ours, theirs, dtype)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, exact, upstream.double()),
        strict=True,
    ):
        assert_equal_within(mine, other, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angles_shape", [(9, 8), (2, 1, 9, 8)])
def test_rotation(angles_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 16).to(dtype).transpose(1, 2).requires_grad_()  # (B, heads, T, D)
    upstream = torch.randn(2, 3, 9, 16).to(dtype)
    half = torch.randn(angles_shape)
    angles = torch.cat([half, half], -1)
    exact = x.detach().double().requires_grad_()
    theirs = plain_rotation(exact, angles.cos().double(), angles.sin().double())
    ours = rotate(x, angles.cos(), angles.sin())
    assert type(ours.grad_fn).__name__ == "_RotateBackward", "the fast path must be the default on CPU"
    assert_equal_within(ours, theirs, dtype)
    (mine,) = torch.autograd.grad(ours, x, upstream)
    (other,) = torch.autograd.grad(theirs, exact, upstream.double())
    assert_equal_within(mine, other, dtype)


def test_without_gradients_the_plain_formulas_agree() -> None:
    x, weight = torch.randn(2, 3, 9, 16), torch.rand(16)
    angles = torch.randn(9, 8).repeat(1, 2)
    with torch.no_grad():
        plain = rms_norm(x, weight, 1e-5), rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain[0])
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), plain[1])


def test_recomputed_gradients_are_the_same_bits() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 9, 16, requires_grad=True), torch.rand(16, requires_grad=True)
    angles = torch.randn(9, 8).repeat(1, 2)

    def block(x: Tensor, weight: Tensor) -> Tensor:
        return rotate(rms_norm(x, weight, 1e-5), angles.cos(), angles.sin())

    kept = torch.autograd.grad(block(x, weight).square().sum(), (x, weight))
    again = torch.autograd.grad(checkpoint(block, x, weight, use_reentrant=False).square().sum(), (x, weight))
    for first, second in zip(kept, again, strict=True):
        assert torch.equal(first, second)


def test_split_backward_gives_the_same_gradients() -> None:
    """Zero-bubble schedules ask for the gradient of the input first and for that of the weight later."""
    x, weight = torch.randn(5, 16, requires_grad=True), torch.rand(16, requires_grad=True)
    loss = rms_norm(x, weight, 1e-5).square().sum()
    (grad_x,) = torch.autograd.grad(loss, x, retain_graph=True)
    (grad_weight,) = torch.autograd.grad(loss, weight)
    together = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), (x, weight))
    assert torch.equal(grad_x, together[0])
    assert torch.equal(grad_weight, together[1])
