"""Which replica gets a request: pure functions over plain data.

Loads are in tokens to generate; a prompt's token counts as a share of one (`PROMPT_SHARE`), as it is computed in large
batches. All that is known of the load is known here, so that the least loaded is taken rather than the better of two
at random.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["prefix", "tokens", "round-robin"]

PROMPT_SHARE = 0.25
"""What a token of a prompt costs, in generated ones: measured 2,280 against 650 to 1,000 tokens/s (160 M, int4)."""
CAP, SLACK = 1.25, 4.0
"""A replica that knows the prompt gets it unless its load is more than this many times the least one's, and that of so
many requests like this one. A bound by the mean (Mirrokni et al. 2018) would leave one of three idle."""
LEAST_MATCH = 0.3
"""Share of a prompt that a replica must know for that to count."""
TABLE_BLOCKS = 200_000
"""Blocks of prompts whose whereabouts are remembered."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that may be chosen."""

    index: int
    load: float
    """What it has still to do."""
    weight: float = 1.0
    """How fast it is in proportion to the fastest."""


def choose(
    policy: Policy, candidates: Sequence[Candidate], cost: float, matched: Mapping[int, float], turn: int
) -> int:
    """Index of the replica for a request. `matched` is the share of its prompt that each replica knows."""
    if policy == "round-robin":
        return candidates[turn % len(candidates)].index
    if policy == "prefix":
        known = _knows_best(candidates, cost, matched)
        if known is not None:
            return known
    return least_tokens(candidates, cost, turn)


def least_tokens(candidates: Sequence[Candidate], cost: float, turn: int) -> int:
    """The replica that would be done first; of equals, each in its turn."""
    first = turn % len(candidates)
    ordered = [*candidates[first:], *candidates[:first]]
    return min(ordered, key=lambda one: (one.load + cost) / one.weight).index


def _knows_best(candidates: Sequence[Candidate], cost: float, matched: Mapping[int, float]) -> int | None:
    """The replica that knows most of the prompt, if it is not loaded too much; of several the least loaded."""
    best = max((matched.get(one.index, 0.0) for one in candidates), default=0.0)
    if best < LEAST_MATCH:
        return None
    knowing = [one for one in candidates if matched.get(one.index, 0.0) == best]
    lightest = min(knowing, key=lambda one: one.load / one.weight)
    least = min(one.load / one.weight for one in candidates)
    within = lightest.load / lightest.weight <= CAP * least + SLACK * cost
    return lightest.index if within else None


@dataclass(slots=True)
class PrefixTable:
    """Which replicas have computed which beginnings of prompts; the least lately used are forgotten."""

    blocks: OrderedDict[int, frozenset[int]] = field(default_factory=OrderedDict)
    """Replicas by the key of a block, which stands for all that is before it, too."""
    limit: int = TABLE_BLOCKS

    def matched(self, keys: Sequence[int]) -> dict[int, float]:
        """The share of a prompt's blocks that each replica knows."""
        shares: dict[int, float] = {}
        for depth, key in enumerate(keys, 1):
            if key not in self.blocks:
                break
            for replica in self.blocks[key]:
                shares[replica] = depth / len(keys)
        return shares

    def note(self, keys: Sequence[int], replica: int) -> None:
        """A replica computes a prompt."""
        for key in keys:
            self.blocks[key] = self.blocks.pop(key, frozenset()) | {replica}
        while len(self.blocks) > self.limit:
            self.blocks.popitem(last=False)

    def forget(self, replica: int) -> None:
        """A replica has died, and its cache with it."""
        for key, known in list(self.blocks.items()):
            if replica in known:
                if left := known - {replica}:
                    self.blocks[key] = left
                else:
                    del self.blocks[key]
