"""Context parallelism as a plan sees it: which kind, which lengths and degrees are legal, who holds which tokens.

Both kinds split the tokens of every sequence over the ranks of the context axis:

    ulysses   a rank holds one run of tokens; two all-to-alls trade tokens for heads around the ordinary attention
              (Jacobs et al. 2023)
    ring      a rank holds one chunk from either end of the sequence, so that a causal mask leaves all ranks the same
              work; keys and values travel around (Liu et al. 2023)

Knows no torch: `sequence.py` splits tensors, `ulysses.py` and `ring.py` attend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

Kind = Literal["ulysses", "ring"]


def chunks(rank: int, ranks: int, kind: Kind) -> tuple[int, ...]:
    """Which of a sequence's equal chunks a rank holds: one of `ranks` (ulysses), or two of 2 * `ranks` (ring)."""
    return (rank,) if kind == "ulysses" else (rank, 2 * ranks - 1 - rank)


def chunk_count(ranks: int, kind: Kind) -> int:
    """How many equal chunks a sequence is cut into."""
    return len(chunks(0, ranks, kind)) * ranks


def problems(
    sequence: int, heads: int, tensor: int, context: int, kind: Kind, *, lengths: Sequence[int]
) -> list[str]:
    """What forbids this context degree for sequences of `sequence` tokens; each with the nearest legal values.

    heads: query heads of the model, of which tensor parallelism leaves a rank heads / tensor. Any number of kv heads is
    legal: both kinds repeat or share them as needed. lengths: what the sequence could be instead, for this batch.
    """
    found, local = [], heads // tensor

    def legal(degree: int, kind: Kind) -> bool:
        return sequence % chunk_count(degree, kind) == 0 and (kind == "ring" or local % degree == 0)

    if legal(context, kind):
        return []
    degrees = _nearest(context, (n for n in range(2, sequence + 1) if legal(n, kind)))
    advice = [f"context {degrees or 1}"]
    if sequence % (cut := chunk_count(context, kind)):
        others = _nearest(sequence, (n for n in lengths if n % cut == 0))
        found.append(
            f"layout.context: {kind} over {context} ranks cuts a sequence into {cut} equal chunks, which {sequence} "
            f"tokens do not give; use {' or '.join([*advice, *([f'train.sequence {others}'] if others else [])])}"
        )
    if kind == "ulysses" and local % context:
        advice += ["ring"] if legal(context, "ring") else []
        found.append(
            f"layout.context: ulysses gives each rank an equal share of the {local} heads that tensor {tensor} leaves, "
            f"which {context} ranks do not divide; use {', or '.join(advice)}"
        )
    return found


def _nearest(value: int, legal: Iterable[int]) -> str:
    """The nearest legal values on either side, in words; empty where there are none."""
    others = list(legal)
    near = [n for n in others if n < value][-1:] + [n for n in others if n > value][:1]
    return " or ".join(map(str, near))


def moved(heads: int, kv_heads: int, context: int, kind: Kind) -> float:
    """Head vectors that a rank sends for each of its tokens and layers in a forward and a backward pass.

    Counted for a model in 16 bits: the gradients of keys and values travel around a ring in fp32, twice as wide.
    """
    if kind == "ring":
        forward, backward = 2 * kv_heads * (context - 1), 2 * kv_heads * (context - 1 + 2 * context)
        return forward + backward
    repeated = math.lcm(kv_heads, context)
    return 2 * (2 * heads + 2 * repeated) * (context - 1) / context


def choose(heads: int, kv_heads: int, context: int) -> tuple[Kind, str]:
    """The kind for a rank's heads (after tensor parallelism), and why."""
    if heads % context:
        return "ring", f"ring: {context} ranks do not divide {heads} heads"
    ulysses, ring = (moved(heads, kv_heads, context, kind) for kind in ("ulysses", "ring"))
    if ring < ulysses:
        return "ring", f"ring: {ring:g} head vectors sent a token and layer, against {ulysses:g} by ulysses"
    return (
        "ulysses",
        f"ulysses: {ulysses:g} head vectors sent a token and layer, against {ring:g} around a ring",
    )
