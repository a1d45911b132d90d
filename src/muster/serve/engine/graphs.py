"""Decoding on a GPU as CUDA graphs: a step of one token a sequence is the same few hundred launches each time, which
take the host longer than the GPU. They are recorded once for each of a few batch sizes, and replayed as one.

Everything that changes between steps is whole numbers, in one buffer that is copied to the GPU before a replay.
S sequences, P pages, V vocab.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from muster.serve.engine.batch import Batch, PagedCache
from muster.serve.engine.network import TransformerNetwork

_LOG = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Sequences of a recorded step; fewer are filled up with copies of the first. Of more the launches do not matter."""
_WARM_UP_STEPS = 2


class GraphedNetwork(TransformerNetwork):
    """A network on a GPU. Prompts are computed as elsewhere, as are experts, adapters and int8 pages: what they
    launch depends on the tokens, or is not Triton's."""

    _recorded: dict[int, Recorded] | None = None

    @torch.inference_mode()
    def logits(self, batch: Batch, cache: PagedCache) -> Tensor:
        size = next((size for size in SIZES if size >= len(batch.lengths)), None)
        static = self.device.type == "cuda" and not self.spec.experts and cache.keys[0].dtype == self.compute
        if size is None or not static or not batch.decodes:
            return super().logits(batch, cache)
        if self._recorded is None:
            self._recorded = {}
        if size not in self._recorded:
            self._recorded[size] = self._record(size, batch, cache)
        return self._recorded[size].run(batch)

    def _record(self, size: int, batch: Batch, cache: PagedCache) -> Recorded:
        """A step of `size` sequences, over this cache from now on."""
        pages = min(-(-self.spec.context // cache.block_tokens), cache.keys[0].shape[0])
        step = StaticBatch(size, pages, self.device)
        step.fill(batch)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what compiles and allocates on its first call does so here
            for _ in range(_WARM_UP_STEPS):
                super().logits(step.batch, cache)
        torch.cuda.current_stream().wait_stream(side)
        graph, others = torch.cuda.CUDAGraph(), list((self._recorded or {}).values())
        with torch.cuda.graph(graph, pool=others[0].graph.pool() if others else None):  # never two at once
            logits = super().logits(step.batch, cache)
        return Recorded(step, graph, logits)


class StaticBatch:
    """Room for a step of `size` sequences with up to `pages` blocks each, at addresses that stay."""

    def __init__(self, size: int, pages: int, device: torch.device) -> None:
        shapes = {
            "tokens": (size,),
            "positions": (size,),
            "slots": (size,),
            "lengths": (size,),
            "table": (size, pages),
        }
        count = size * (4 + pages)
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._there = self._host.to(device)
        self._fields = dict(_cut(self._host, shapes))
        self.batch = Batch(
            **dict(_cut(self._there, shapes)),
            starts=torch.arange(size + 1, device=device),
            wanted=torch.arange(size, device=device),
        )

    def fill(self, batch: Batch) -> None:
        """A batch's numbers. Rows that are too many repeat the first, so what they write is there anyhow."""
        for name, room in self._fields.items():
            values = getattr(batch, name)
            if values.ndim == 2:
                room = room[:, : values.shape[1]]
            room[: len(values)] = values
            room[len(values) :] = values[0]
        self._there.copy_(self._host, non_blocking=True)


class Recorded:
    """A step that can be replayed."""

    def __init__(self, step: StaticBatch, graph: torch.cuda.CUDAGraph, logits: Tensor) -> None:
        self._step, self.graph, self._logits = step, graph, logits

    def run(self, batch: Batch) -> Tensor:
        """fp32 logits (S, V), until the next replay."""
        self._step.fill(batch)
        self.graph.replay()
        return self._logits[: len(batch.lengths)]


def _cut(numbers: Tensor, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Views of one buffer, one after the other."""
    start = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        yield name, numbers[start : start + size].view(shape)
        start += size
