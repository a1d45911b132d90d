"""Gradient buffers where a rank is alone on its shard axis, so that there is nothing to scatter.

FSDP2 asks for the input and for the output of each reduce-scatter, and where the group has
one rank copies the first to the second. Lending it the same buffer for both saves that copy
and the memory of a second set of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class InPlaceReduction:
    """For `FSDPModule.set_custom_reduce_scatter`, one for each unit, where the shard axis has one rank."""

    def __init__(self) -> None:
        self._lent: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The input of a reduction, and at the next call, which asks for its output, the same tensor."""
        if self._lent is None:
            self._lent = torch.empty(*size, dtype=dtype, device=device)
            return self._lent
        buffer, self._lent = self._lent, None
        assert buffer.shape == torch.Size(size)
        return buffer

    def __call__(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a reduce-scatter over one rank needs no communication")
