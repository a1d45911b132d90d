"""Tensors in memory of huge pages (`packed_bytes.huge_memory` says why)."""

from __future__ import annotations

import torch
from torch import Tensor

from muster.serve.engine.packed_bytes import huge_memory

_CHUNK_BYTES = 64 << 20
_ALIGNED = 64


def huge_bytes(count: int) -> Tensor:
    """`count` bytes, uint8, which begin a huge page; zeros."""
    return torch.frombuffer(huge_memory(count), dtype=torch.uint8)


class HugePages:
    """Copies tensors one after the other into such memory."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a CPU tensor."""
        if self._used + tensor.nbytes > len(self._chunk):
            self._chunk, self._used = huge_bytes(max(_CHUNK_BYTES, tensor.nbytes)), 0
        place = self._chunk[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
