"""Perplexity and bits per byte on the held-out documents, shared out over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from muster.data.evaluation import EvaluationBatches
from muster.data.packing import Batch
from muster.parallel.world import World


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out documents' code length under the model."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean cross entropy per token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float:
        """Code length of the documents per byte of their text; comparable across tokenizers, and with gzip."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def evaluate(loss: Callable[[Batch], Tensor], batches: EvaluationBatches, world: World) -> Evaluation:
    """Score every batch once, shared out over the ranks; `loss` sums a batch's. The same on every rank."""
    nats, tokens = 0.0, 0
    # Under ZeRO every rank joins each gather, so all score equally many batches; those past the end are empty.
    for index in range(world.rank, -(-len(batches) // world.size) * world.size, world.size):
        batch = batches.batch(index)
        nats += float(loss(batch))
        tokens += batch.valid_tokens
    total_nats, total_tokens = world.sum(nats, tokens)
    return Evaluation(nats=total_nats, tokens=int(total_tokens), bytes=batches.bytes)
