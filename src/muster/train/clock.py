"""When something that happens at intervals is due: after a number of steps, or after a length of time."""

from __future__ import annotations

import time

from muster.config.units import Every


class Alarm:
    """Rings every so many steps or seconds. With seconds, only the first rank's clock counts: ask it there."""

    def __init__(self, every: Every | None) -> None:
        self._every = every
        self._since = time.monotonic()

    def change(self, every: Every) -> None:
        """Ring at another interval from now on; the time since the last ring counts."""
        self._every = every

    def rings(self, step: int) -> bool:
        """True if due after `step` finished steps; the time starts anew when it rings."""
        if self._every is None:
            return False
        if self._every.steps is not None:
            return step % self._every.steps == 0
        assert self._every.seconds is not None
        if time.monotonic() - self._since < self._every.seconds:
            return False
        self._since = time.monotonic()
        return True
