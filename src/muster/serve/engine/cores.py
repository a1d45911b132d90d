"""Keeps HTTP off the core that computes the next step.

The system wakes whoever is told of a step where the one who tells runs: there HTTP, and often its client after it,
holds up what all of the engine's other cores wait for. Anywhere else it holds up one, whose part the rest do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

this_core = ctypes.CDLL(None).sched_getcpu
"""The core that the calling thread runs on now."""


class Apart:
    """Where the calling thread may run: on all cores but one, which now and then is another."""

    def __init__(self) -> None:
        self._all = os.sched_getaffinity(0)
        self._left = -1

    def keep_off(self, core: int) -> None:
        if core != self._left:
            self._left = core
            _move(self._all - {core})

    def end(self) -> None:
        """Leave it all cores again."""
        self._left = -1
        _move(self._all)


def _move(cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # none is left, or it may not
        os.sched_setaffinity(0, cores)
