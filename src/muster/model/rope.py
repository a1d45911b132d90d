"""Rotary position embeddings (Su et al. 2021), in the half-split convention of the Hugging Face models:
dimension i is rotated together with dimension i + D/2."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from muster.model.spec import RopeScaling, TransformerSpec


@functools.lru_cache(maxsize=8)
def rotation(spec: TransformerSpec, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, D) in fp32 for positions 0..length-1; the halves of D are the same."""
    # What is made under inference_mode could not be saved for the backward pass of a later caller.
    with torch.inference_mode(False):
        cos, sin = rotation_at(spec, torch.arange(length, device="cpu"))
        return cos.to(device), sin.to(device)


def rotation_at(spec: TransformerSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., D) in fp32 for any positions (...)."""
    frequencies = _frequencies(spec, positions.device)
    angles = positions[..., None].float() * frequencies  # (..., D/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (..., T, D) by the angles of its positions; cos and sin (..., T, D), computed in fp32."""
    if x.device.type == "cpu" and torch.is_grad_enabled():
        out: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
        return out
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The rotation in half the passes; its gradient is the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, direction=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, direction=-1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    exact = x.float()
    # In the order of its dims, so that attention need not copy what was a transposed view.
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    torch.mul(exact, cos, out=out)
    out[..., :half].addcmul_(exact[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(exact[..., :half], sin[..., half:], value=direction)
    return out.to(x.dtype)


@functools.lru_cache(maxsize=8)
def _frequencies(spec: TransformerSpec, device: torch.device) -> Tensor:
    """(D/2,), kept on a device: what is captured there as a graph must not copy from the host."""
    with torch.inference_mode(False):
        return _frequencies_of(spec).to(device)


def _frequencies_of(spec: TransformerSpec) -> Tensor:
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device="cpu") / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents  # (D/2,)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling.low_frequency, scaling.high_frequency
    # 1 keeps a frequency, 0 divides it by the factor, between the two borders it is blended.
    keep = ((scaling.original_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
