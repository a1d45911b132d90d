"""Whether a failed attempt is worth another, and after how long. Pure: no clock, no process.

`restarts` is how many restarts in a row a run may take without a newly committed checkpoint: each one that is
committed makes the budget whole again, so a run that makes headway goes on for as long as it does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

REPEATS = 3
"""So often the same failure at the same step, and it is taken for one that will always come."""
_FIRST_DELAY_S, _LONGEST_DELAY_S = 1.0, 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What ended an attempt."""

    sentence: str
    """Who failed and how, a rank's traceback included."""
    node: str = ""
    rank: int | None = None
    signal: str | None = None
    """Name of the signal that killed the rank."""
    exit_code: int = 1
    step: int = -1
    """Updates done when it came; -1 before the first one of the attempt."""
    certain: bool = False
    """It would come again however often the ranks are restarted."""
    consequence: bool = False
    """It only tells of a peer that has died."""


@dataclass(frozen=True, slots=True)
class Verdict:
    delay_s: float | None
    """Seconds until the next attempt; None for no further one."""
    why: str
    """In a few words, for after the failure's sentence; may be empty."""


@dataclass(kw_only=True)
class Budget:
    restarts: int
    headway: str = "a new checkpoint"
    """What makes it whole again, in words."""
    used: int = field(default=0, init=False)
    """Restarts since the last newly committed checkpoint."""
    _committed: int = field(default=0, init=False)
    _last: tuple[int, str] | None = field(default=None, init=False)
    _same: int = field(default=0, init=False)

    def failed(self, failure: Failure, committed: int) -> Verdict:
        """Judge a failure; `committed` is the step of the newest checkpoint.

        The first restart comes at once, those that follow without headway after 1, 2, 4 ... 60 s.
        """
        if committed > self._committed:
            self.used, self._committed = 0, committed
        signature = (failure.step, _gist(failure.sentence))
        self._same = self._same + 1 if signature == self._last else 1
        self._last = signature
        if failure.certain:
            return Verdict(None, "")
        if self._same >= REPEATS:
            at = f"after step {failure.step}" if failure.step >= 0 else "before the first step"
            return Verdict(
                None,
                f"the same failure {at} for the {self._same}rd time in a row: a restart will not cure it",
            )
        if self.used >= self.restarts:
            return Verdict(
                None,
                f"all {self.restarts} restarts (faults.restarts) are used without {self.headway}: once the cause "
                f"is gone, run the same command again to resume",
            )
        self.used += 1
        delay_s = 0.0 if self.used == 1 else min(_FIRST_DELAY_S * 2 ** (self.used - 2), _LONGEST_DELAY_S)
        return Verdict(delay_s, f"restart {self.used} of {self.restarts}")


def _gist(sentence: str) -> str:
    """The last line without its figures: addresses, ports and process ids differ each time."""
    lines = [line for line in sentence.splitlines() if line.strip()]
    return re.sub(r"\d+", "#", lines[-1]) if lines else ""
