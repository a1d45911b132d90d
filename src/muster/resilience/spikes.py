"""Spikes: a step whose loss or gradient norm stands far above the steps before it. Pure, over plain numbers.

Far is meant against the median of the recent steps, in units of their median absolute deviation, which a few
outliers do not move, and as a ratio, so that a curve without any noise has room to move too.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

WINDOW = 64
"""Steps that a new one is held against."""
LEAST = 32
"""Steps that must have been seen before any is called a spike."""
_Z = 6.0
_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_RATIO = {"loss": 1.25, "gradient norm": 5.0}


def stands_out(value: float, history: Sequence[float], least_ratio: float) -> bool:
    """Whether `value` is far above the values of `history`; never where those are too few."""
    if len(history) < LEAST:
        return False
    median = statistics.median(history)
    deviation = _TO_SIGMA * statistics.median(abs(past - median) for past in history)
    return value > median + _Z * deviation and value > least_ratio * median


class Spikes:
    """Remembers the steps that were applied, and judges the next one."""

    def __init__(self) -> None:
        self._past = {name: deque[float](maxlen=WINDOW) for name in _LEAST_RATIO}

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step, or None."""
        for (name, past), value in zip(self._past.items(), (loss, gradient_norm), strict=True):
            if stands_out(value, past, _LEAST_RATIO[name]):
                return f"{name} {value:.4g} against a median of {statistics.median(past):.4g} in {len(past)} steps"
        return None

    def add(self, loss: float, gradient_norm: float) -> None:
        """Take in a step that was applied."""
        for past, value in zip(self._past.values(), (loss, gradient_norm), strict=True):
            past.append(value)

    def state(self) -> list[list[float]]:
        """The remembered losses and gradient norms, oldest first."""
        return [list(past) for past in self._past.values()]

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        for past, values in zip(self._past.values(), state, strict=True):
            past.clear()
            past.extend(values)
