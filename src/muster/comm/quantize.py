"""Block-wise int8 quantisation of flat buffers, as they go over the wire.

Every 256 elements share one fp32 scale, the block's largest magnitude / 127, so a value is
off by at most 1/254 of that magnitude (Dettmers et al. 2022 use the same blocks for
optimizer states). A row of N elements becomes N code bytes and then its scales, one message.
A block with a nan or inf decodes to nothing finite, so a bad gradient is still found.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256
_LEVELS = 127
_SMALLEST = 1e-30  # below it a block counts as zero, which keeps its inverse finite
_CPU_PIECE = (
    1024 * BLOCK
)  # 1 MiB of fp32: large temporaries cost page faults, small ones calls (measured: 3x)


def encoded_bytes(elements: int) -> int:
    """Bytes that a row of `elements` takes encoded: 1.016 each instead of 2 (bf16) or 4 (fp32)."""
    return elements + 4 * -(-elements // BLOCK)


@torch.no_grad()
def encode(values: Tensor) -> Tensor:
    """Floating-point (R, N) -> uint8 (R, encoded_bytes(N)), each row on its own, to the nearest code."""
    rows, elements = values.shape
    encoded = values.new_empty((rows, encoded_bytes(elements)), dtype=torch.uint8)
    codes = encoded[:, :elements].view(torch.int8)
    scales = values.new_empty((rows, -(-elements // BLOCK)), dtype=torch.float32)
    for block, code, scale in _pieces(values, codes, scales):
        block = block.float()
        largest = torch.maximum(block.amax(-1, keepdim=True), block.amin(-1, keepdim=True).neg_())
        code.copy_((block * (_LEVELS / largest.clamp_min(_SMALLEST))).round_())
        torch.div(largest, _LEVELS, out=scale)
    encoded[:, elements:] = scales.view(torch.uint8)
    return encoded


@torch.no_grad()
def decode(encoded: Tensor, out: Tensor) -> None:
    """Write what uint8 (R, encoded_bytes(N)) stands for to floating-point `out` (R, N)."""
    for target, code, scale in _decodable(encoded, out):
        target.copy_(code * scale)


@torch.no_grad()
def add_decoded(encoded: Tensor, out: Tensor, *, factor: float = 1.0) -> None:
    """Add `factor` times what uint8 (R, encoded_bytes(N)) stands for to floating-point `out` (R, N)."""
    for target, code, scale in _decodable(encoded, out):
        target.add_(code * scale, alpha=factor)


def _decodable(encoded: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    rows, elements = out.shape
    assert encoded.shape == (rows, encoded_bytes(elements))
    # The scales need not lie at a multiple of four bytes, so they are copied out.
    scales = encoded[:, elements:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return _pieces(out, encoded[:, :elements].view(torch.int8), scales)


def _pieces(values: Tensor, codes: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views (blocks, BLOCK), (blocks, BLOCK), (blocks, 1) of a piece after another; a row's rest is a short block."""
    elements = values.shape[1]
    whole = elements // BLOCK * BLOCK
    step = _CPU_PIECE if values.device.type == "cpu" else max(whole, 1)
    for value, code, scale in zip(values, codes, scales, strict=True):
        for start in range(0, whole, step):
            end = min(start + step, whole)
            yield (
                value[start:end].view(-1, BLOCK),
                code[start:end].view(-1, BLOCK),
                scale[start // BLOCK : end // BLOCK].view(-1, 1),
            )
        if whole < elements:
            yield value[whole:].view(1, -1), code[whole:].view(1, -1), scale[-1:].view(1, 1)
