"""A rank's memory for attention around a ring grows with the tokens it holds, not with their square."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muster.model.attend import attend
from muster.parallel.ring import Ring
from muster.parallel.world import join

D, FP32 = 16, 4


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of every tensor made under it for as long as it lives, and keeps the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


def peak_bytes(strategy: Any, length: int, documents: Tensor | None = None) -> int:
    """Peak of a forward and backward pass of one head over `length` tokens of this rank."""
    with PeakBytes() as counter:
        q, k, v, upstream = (torch.randn(1, 1, length, D, requires_grad=True) for _ in range(4))
        torch.autograd.grad(strategy(q, k, v, documents=documents), (q, k, v), upstream)
    return counter.peak


def ring_peaks(lengths: list[int], document_tokens: int) -> list[int]:
    peaks = []
    with join(timeout_s=600) as world:
        assert dist.group.WORLD is not None
        for length in lengths:
            documents = torch.arange(length)[None] // document_tokens
            peaks.append(peak_bytes(Ring(dist.group.WORLD), length // world.size, documents))
    return peaks


def growth_bytes(lengths: list[int], peaks: list[int]) -> list[float]:
    """Bytes for each further token."""
    steps = zip(itertools.pairwise(lengths), itertools.pairwise(peaks), strict=True)
    return [(more - less) / (longer - shorter) for (shorter, longer), (less, more) in steps]


def check_ring(lengths: list[int], document_tokens: int, run_ranks: Any) -> None:
    ranks = 2
    for peaks in run_ranks(ranks, ring_peaks, lengths, document_tokens):
        own = growth_bytes([length // ranks for length in lengths], peaks)
        assert own == pytest.approx([own[0]] * len(own), rel=0.02), "not linear"
        # Token vectors: q, k, v, out, gradients of out and q: 6; k and v stacked: 2, and those of the other rank: 2;
        # gradients of k and v, at hand, leaving and arriving: 6.
        assert own[0] < 17 * D * FP32


def test_memory_of_a_ring_is_linear(run_ranks: Any) -> None:
    check_ring([4096, 8192, 12288], 4096, run_ranks)


@pytest.mark.long
def test_memory_of_a_ring_is_linear_up_to_128k_tokens(run_ranks: Any) -> None:
    check_ring([32768, 81920, 131072], 4096, run_ranks)


def test_the_meter_sees_kept_scores() -> None:
    lengths = [512, 1024, 2048]
    first, second = growth_bytes(lengths, [peak_bytes(attend, length) for length in lengths])
    assert second > 1.5 * first
