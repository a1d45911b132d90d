"""What a step of ZeRO (Rajbhandari et al. 2020) must send, from sizes alone; the meter has to agree exactly.

Pure arithmetic over the units in which parameters are gathered and gradients reduced. The
table of `parallel/data.py` says how often each happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from muster.comm.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Parameters that are gathered and reduced together."""

    shard_elements: int
    """On one rank, padding included."""
    regathers: bool
    """Dropped after the forward pass, so that ZeRO-3's backward pass gathers it again."""


def zero_traffic(
    units: Iterable[Unit],
    *,
    zero: Literal[0, 1, 2, 3],
    shard: int,
    replicate: int,
    microbatches: int,
    parameter_bytes: int,
    gradient_bytes: int,
) -> Traffic:
    """One rank's traffic of one step, over the axes `shard` and `replicate`.

    `parameter_bytes` and `gradient_bytes` are the sizes of one element when gathered and when reduced.
    """
    traffic = Traffic()
    for unit in units:
        whole = unit.shard_elements * shard
        gathers = 1 if zero <= 1 else microbatches * (2 if zero == 3 and unit.regathers else 1)
        reduces = 1 if zero <= 1 else microbatches
        if shard > 1:
            for _ in range(gathers):
                traffic.count("shard", "all-gather", whole * parameter_bytes, shard)
            for _ in range(reduces):
                traffic.count("shard", "reduce-scatter", whole * gradient_bytes, shard)
        if replicate > 1:
            for _ in range(reduces):
                traffic.count("replicate", "all-reduce", unit.shard_elements * gradient_bytes, replicate)
    return traffic
