"""What a step must send over the axes that divide activations, from plain sizes; the meter has to agree exactly.

    axis      each time                      what travels (B rows, T tokens, E width, of one microbatch)
    tensor    a region is entered or left    B T E; forward, and transposed backward
    pipeline  a stage borders on another     B T E forward, the gradient backward, one message each
    context   ring: an attention             keys and values C - 1 times forward and again backward, their fp32
              (Liu et al. 2023)              gradients C times
              ulysses: an attention          queries, keys, values out and what they give home; the same backward
              (Jacobs et al. 2023)
    expert    a layer with experts           each token's row to its k experts and back, and the same backward

Recomputed activations are exchanged again. What the ranks of the axes replicate and shard exchange, weights
and gradients, is in `formulas.py`. Knows no modules: counts of layers and of elements come from the caller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from muster.comm.traffic import Traffic

Recompute = Literal["none", "selective", "full"]
_INT64_BYTES = 8
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """The hidden states of one microbatch between layers, on one rank: B rows of T tokens, E wide.

    T counts the tokens that a rank of the context axis holds, before sequence parallelism divides them.
    """

    rows: int
    tokens: int
    width: int
    element_bytes: int

    @property
    def bytes(self) -> int:
        return self.rows * self.tokens * self.width * self.element_bytes


def region_traffic(
    hidden: Hidden,
    *,
    ranks: int,
    sequence: bool,
    blocks: int,
    embedding: bool,
    head: bool,
    recompute: Recompute,
) -> Traffic:
    """What one microbatch sends over the tensor axis at the borders of its regions (Shoeybi et al. 2019; with
    `sequence` parallelism, Korthikanti et al. 2022).

    A block has two regions, attention and feed-forward. The embedding is a region that is only left, and what
    comes after the last norm (`head`: head and loss) one that is only entered.
    """
    entered, left = 2 * blocks + head, 2 * blocks + embedding
    # Nothing that the backward pass needs comes after a block's second region, so that is not left again.
    entered_again, left_again = (2 * blocks, blocks) if recompute == "full" else (0, 0)
    traffic = Traffic()
    if sequence:
        gathers, scatters = entered + entered_again + left, left + left_again + entered
        traffic.count("tensor", "all-gather", hidden.bytes, ranks, times=gathers)
        traffic.count("tensor", "reduce-scatter", hidden.bytes, ranks, times=scatters)
    else:
        traffic.count("tensor", "all-reduce", hidden.bytes, ranks, times=left + left_again + entered)
    return traffic


def loss_traffic(hidden: Hidden, *, ranks: int, chunk_rows: int) -> Traffic:
    """What one microbatch's loss sends where the vocabulary is divided over the tensor axis.

    A token costs three fp32: its largest logit, then its sum of exponentials and its target's logit together.
    """
    traffic = Traffic()
    tokens = hidden.rows * hidden.tokens
    for start in range(0, tokens, chunk_rows):
        chunk = min(chunk_rows, tokens - start)
        traffic.count("tensor", "all-reduce", chunk * _FP32_BYTES, ranks)
        traffic.count("tensor", "all-reduce", 2 * chunk * _FP32_BYTES, ranks)
    return traffic


def shared_gradient_traffic(
    elements: Iterable[int], *, ranks: int, element_bytes: int, times: int
) -> Traffic:
    """Gradients of parameters that all tensor ranks hold whole and use in part, each reduced `times` in a step."""
    traffic = Traffic()
    for size in elements:
        traffic.count("tensor", "all-reduce", size * element_bytes, ranks, times=times)
    return traffic


def pipeline_traffic(
    rank_of_stage: Sequence[int], rank: int, *, message_bytes: int, microbatches: int, tied_bytes: int | None
) -> Traffic:
    """What a rank sends to other ranks of its pipeline, which hold the stages `rank_of_stage`.

    `message_bytes` are one microbatch's hidden states between stages. The order of a schedule changes nothing.
    `tied_bytes`: this rank's part of the gradient of an embedding that is on the first and the last stage; or None.
    """
    ranks = max(rank_of_stage) + 1
    messages = sum(
        source != target and rank in (source, target) for source, target in itertools.pairwise(rank_of_stage)
    )  # an activation from the one, a gradient from the other
    traffic = Traffic()
    traffic.count("pipeline", "send", message_bytes, ranks, times=messages * microbatches)
    ends = {rank_of_stage[0], rank_of_stage[-1]}
    if tied_bytes is not None and rank in ends and len(ends) == 2:
        traffic.count("pipeline", "send", tied_bytes, ranks)
    return traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Queries, keys and values of one microbatch on one rank, as one attention has them."""

    rows: int
    tokens: int
    """Of each row, on this rank of the context axis."""
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int

    def bytes(self, heads: int) -> int:
        return self.rows * self.tokens * heads * self.head_dim * self.element_bytes


def ring_traffic(heads: Heads, *, ranks: int, recompute: Recompute) -> Traffic:
    """One attention, forward and backward, in a ring."""
    hop = heads.bytes(2 * heads.kv_heads)
    passes = 2 if recompute == "none" else 3
    traffic = Traffic()
    traffic.count("context", "send", hop, ranks, times=passes * (ranks - 1))
    traffic.count("context", "send", hop // heads.element_bytes * _FP32_BYTES, ranks, times=ranks)
    return traffic


def ulysses_traffic(heads: Heads, *, ranks: int, recompute: Recompute) -> Traffic:
    """One attention, forward and backward, between all-to-alls. Kv heads are repeated until the ranks divide them."""
    kv_heads = math.lcm(heads.kv_heads, ranks)
    out, home = heads.bytes(heads.heads + 2 * kv_heads), heads.bytes(heads.heads)
    traffic = Traffic()
    traffic.count("context", "all-to-all", out, ranks, times=2 if recompute == "none" else 3)
    # Selective recomputation ends with the scores, before they have given anything to send home.
    traffic.count("context", "all-to-all", home, ranks, times=3 if recompute == "full" else 2)
    return traffic


def balance_traffic(*, rows: int, experts: int, ranks: int, recompute: Recompute) -> Traffic:
    """Counts of the tokens that chose each expert in each row, (B, X) int64, of one layer with a balance loss."""
    traffic = Traffic()
    times = 2 if recompute == "full" else 1
    traffic.count("context", "all-reduce", rows * experts * _INT64_BYTES, ranks, times=times)
    return traffic


@dataclass(frozen=True, slots=True)
class Routed:
    """Rows that one layer exchanges for one microbatch: the tokens of a rank, each once for each of its experts."""

    sent: tuple[int, ...]
    """To the experts of each rank of the axis."""
    received: tuple[int, ...]
    """From each rank, for the experts here."""


def expert_traffic(
    routed: Routed, rank: int, *, experts: int, row_bytes: int, recompute: Recompute
) -> Traffic:
    """One layer's exchange of one microbatch, forward and backward, seen from `rank` of the expert axis.

    Rows are dispatched and come home, and their gradients go the same two ways. How many there are for each expert
    (int64) is exchanged first.
    """
    ranks = len(routed.sent)
    again = recompute == "full"
    traffic = Traffic()
    traffic.count("expert", "all-to-all", experts * _INT64_BYTES, ranks, times=1 + again)
    for rows in (routed.sent, routed.received):
        traffic.count(
            "expert",
            "all-to-all",
            sum(rows) * row_bytes,
            ranks,
            kept_bytes=rows[rank] * row_bytes,
            times=2 + again,
        )
    return traffic
