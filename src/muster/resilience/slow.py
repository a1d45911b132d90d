"""Slow ranks: whose own computation takes longer than its peers', step after step. Pure, over the heartbeats' figures.

All ranks wait for the slowest, so their steps take the same time; what is compared is each rank's time without its
waits. One step says little on a shared machine: a rank is slow when the median of a window of steps stands out from
its peers by much, and by many times what that median varies by chance.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from muster.resilience.beats import TIMED, StepTimes

_WINDOW = 16
_LEAST_RATIO = 1.3
_LEAST_SCORE = 5.0
_LEAST_SPREAD = 0.02
"""Of the logarithm of a ratio: less than 2 % from step to step is taken for 2 %."""
_MAD_TO_SIGMA = 1.4826
_MEDIAN_TO_MEAN = 1.2533
"""How much more the median of a sample varies than its mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slow:
    """A rank that has become slow, or that no longer is (`ratio` below)."""

    rank: int
    step: int
    ratio: float
    """Its time over the median of its peers', over the window."""
    score: float
    """Standard deviations that it stands out by (median and MAD)."""
    phase: str
    """Where it loses most."""
    is_slow: bool

    def __str__(self) -> str:
        if not self.is_slow:
            return f"rank {self.rank} is as fast as the others again"
        return (
            f"rank {self.rank} is slow: its steps take {self.ratio:.1f} times its peers' own time up to step "
            f"{self.step}, most of it in {self.phase}; look at what else runs on its machine, or its clock and cooling"
        )


class SlowRanks:
    """Told of finished steps, says which ranks become slow; `peers` are the sets of ranks with equal work."""

    def __init__(self, peers: Sequence[Sequence[int]]) -> None:
        self._peers = [tuple(ranks) for ranks in peers if len(ranks) > 1]
        self._waiting: dict[int, dict[int, StepTimes]] = {}
        self._done = 0
        self._ratios: dict[int, deque[float]] = {}
        self._excess: dict[int, deque[tuple[float, ...]]] = {}
        self._slow: set[int] = set()

    def feed(self, rank: int, steps: Sequence[StepTimes]) -> list[Slow]:
        """Some last steps of a rank, of which it may have told before; what has changed by them."""
        for times in steps:
            if times.step > self._done:
                self._waiting.setdefault(times.step, {})[rank] = times
        found = []
        everyone = {rank for ranks in self._peers for rank in ranks}
        for step in sorted(self._waiting):
            if self._waiting[step].keys() >= everyone:
                told = self._waiting[step]
                # Of a step before it some rank's row was overwritten before anyone looked.
                self._waiting = {later: rows for later, rows in self._waiting.items() if later > step}
                self._done = step
                found += [slow for ranks in self._peers for slow in self._step(step, ranks, told)]
        return found

    def _step(self, step: int, ranks: Sequence[int], told: Mapping[int, StepTimes]) -> list[Slow]:
        totals = {rank: sum(told[rank].seconds) for rank in ranks}
        found = []
        for rank in ranks:
            others = median(totals[other] for other in ranks if other != rank)
            if totals[rank] <= 0 or others <= 0:
                continue
            phases = tuple(
                told[rank].seconds[index]
                - median(told[other].seconds[index] for other in ranks if other != rank)
                for index in range(len(TIMED))
            )
            ratios = self._ratios.setdefault(rank, deque(maxlen=_WINDOW))
            ratios.append(math.log(totals[rank] / others))
            self._excess.setdefault(rank, deque(maxlen=_WINDOW)).append(phases)
            changed = self._judge(step, rank, ratios)
            found += [changed] if changed else []
        return found

    def _judge(self, step: int, rank: int, ratios: Sequence[float]) -> Slow | None:
        if len(ratios) < _WINDOW:
            return None
        middle = median(ratios)
        spread = max(median(abs(ratio - middle) for ratio in ratios) * _MAD_TO_SIGMA, _LEAST_SPREAD)
        score = middle / (spread * _MEDIAN_TO_MEAN / math.sqrt(len(ratios)))
        is_slow = middle > math.log(_LEAST_RATIO) and score > _LEAST_SCORE
        recovered = rank in self._slow and middle < math.log(_LEAST_RATIO) / 2
        if not (is_slow and rank not in self._slow) and not recovered:
            return None
        (self._slow.discard if recovered else self._slow.add)(rank)
        excess = [median(row[index] for row in self._excess[rank]) for index in range(len(TIMED))]
        return Slow(
            rank=rank,
            step=step,
            ratio=math.exp(middle),
            score=score,
            phase=TIMED[excess.index(max(excess))],
            is_slow=not recovered,
        )
