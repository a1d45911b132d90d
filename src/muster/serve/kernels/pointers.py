"""What the C++ operations are given, checked before its address is: C++ takes Python's word for all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from muster.serve.kernels.shape import SCALE_BYTES, Heads

FLOATS = (torch.float32, torch.bfloat16)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def checked(x: Tensor, width: int, *, exact: bool = False) -> Tensor:
    """x (N, width) as the kernels take it; with `exact`, it must already be so, since it is changed in place."""
    if x.dtype not in FLOATS or not x.is_cpu or x.dim() != 2 or x.shape[1] != width:
        raise TypeError(
            f"expected (N, {width}) in fp32 or bf16 on the CPU, got {tuple(x.shape)} in {x.dtype}"
        )
    if exact and not x.is_contiguous():
        raise TypeError("what is changed in place must be contiguous")
    return x.contiguous()


def checked_fp32(tensor: Tensor, width: int) -> None:
    if tensor.dtype != torch.float32 or tensor.shape[-1] != width or not tensor.is_contiguous():
        raise TypeError(f"expected fp32 of width {width}, got {tuple(tensor.shape)} in {tensor.dtype}")


def checked_pages(compute: torch.dtype, heads: Heads, keys: Tensor, values: Tensor) -> None:
    """Of one layer, for activations of a type."""
    row = heads.dim + (SCALE_BYTES if keys.dtype == torch.int8 else 0)
    if keys.shape[1] != heads.kv_heads or keys.shape[3] != row or heads.dim % 2:
        raise TypeError(f"pages of shape {tuple(keys.shape)} are not those of {heads}")
    for pages in (keys, values):
        fits = pages.dtype == keys.dtype in (compute, torch.int8) and pages.shape == keys.shape
        if not fits or not pages.is_contiguous():
            raise TypeError(
                f"pages must be contiguous, of one shape, and int8 or {compute} like the activations"
            )
