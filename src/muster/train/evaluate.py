"""Perplexity and bits per byte on the held-out documents, shared out over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


class BrokenOff(Exception):
    """A rank was asked to stop in the middle of an evaluation; raised on all ranks."""


@torch.no_grad()
def evaluate(
    score: Callable[[Sequence[Batch]], Tensor],
    batches: EvaluationBatches,
    world: World,
    *,
    part: int = 0,
    parts: int = 1,
    at_once: int = 1,
    counts_tokens: bool = True,
    asked: Callable[[], bool] | None = None,
) -> Evaluation:
    """Score every batch once, shared out over the data parts; the same figures on every rank.

    `score` gives this rank's share of the summed loss of `at_once` batches. Ranks that read the same part as
    others leave it to one of them to count its tokens. BrokenOff, on all ranks, as soon as one is `asked` to stop.
    """
    nats, tokens = 0.0, 0
    # Under ZeRO every rank joins each gather, so all score equally many batches; those past the end are empty.
    turns = -(-len(batches) // (parts * at_once))
    for turn in range(turns):
        if asked is not None and any(world.sum(asked())):
            raise BrokenOff
        some = [batches.batch((turn * at_once + index) * parts + part) for index in range(at_once)]
        nats += float(score(some))
        tokens += sum(batch.valid_tokens for batch in some) if counts_tokens else 0
    total_nats, total_tokens = world.sum(nats, tokens)
    return Evaluation(nats=total_nats, tokens=int(total_tokens), bytes=batches.bytes)
