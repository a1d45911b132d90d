"""How often to save: the interval that loses least to saving and to failures together. Pure sums.

Young, "A first order approximation to the optimum checkpoint interval" (1974); Daly, "A higher order
estimate of the optimum checkpoint interval for restart dumps" (2006).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ASSUMED_S = 86_400.0
"""Time between two failures of one machine, until the run has seen some of its own: a day."""
FIRST_S = 120.0
"""Interval before the first save has been measured."""
LONGEST_S = 3_600.0
"""However cheap failures are thought to be, no more than an hour's work is put at risk."""
_CLEAN_ENDS = frozenset({"finished", "preempted"})


@dataclass(frozen=True, slots=True)
class History:
    """What the run has lived through before it was started this time."""

    failures: int = 0
    seconds: float = 0.0


def history(events: Sequence[Mapping[str, Any]]) -> History:
    """From the records of a run: each start without a clean end was a failure; time counts from a start to the last
    record before the next one."""
    failures, seconds = 0, 0.0
    begun: float | None = None
    last, clean = 0.0, True
    for event in events:
        kind, time = event.get("event"), float(event.get("time", 0.0))
        if kind == "started":
            if begun is not None:
                failures, seconds = failures + (not clean), seconds + last - begun
            begun, clean = time, False
        elif kind in _CLEAN_ENDS:
            clean = True
        last = time
    if begun is not None:
        failures, seconds = failures + (not clean), seconds + last - begun
    return History(failures, seconds)


def mean_time_between_failures(past: History, machines: int, running_s: float = 0.0) -> float:
    """Of the whole job in seconds: the assumption of one failure a machine and day, weighed as one that was seen."""
    return (ASSUMED_S / machines + past.seconds + running_s) / (1 + past.failures)


def daly(cost_s: float, between_failures_s: float) -> float:
    """Seconds of work between two saves that cost `cost_s` each (Daly's equation 37)."""
    if cost_s >= 2 * between_failures_s:
        return between_failures_s
    ratio = cost_s / (2 * between_failures_s)
    return math.sqrt(2 * cost_s * between_failures_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def choose(
    *, cost_s: float, duration_s: float, past: History, machines: int, running_s: float = 0.0
) -> tuple[float, str]:
    """The interval in seconds and why; a save stalls training for `cost_s` and is on disk after `duration_s`."""
    between = mean_time_between_failures(past, machines, running_s)
    wanted = daly(cost_s, between)
    interval = min(max(wanted, duration_s), LONGEST_S)
    seen = f"{past.failures} seen" if past.failures else "assumed"
    reason = (
        f"a save stalls training for {cost_s * 1e3:.0f} ms, a failure every {between / 3600:.3g} h "
        f"({seen}; {machines} machine{'s' * (machines > 1)}): Daly's optimum is {wanted:.3g} s"
    )
    if interval > wanted:
        reason += f", but a save takes {duration_s:.3g} s"
    elif interval < wanted:
        reason += f", and {LONGEST_S:.0f} s the most"
    return interval, reason
