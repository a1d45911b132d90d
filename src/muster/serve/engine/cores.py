"""Keeps HTTP off the core that computes the next step, where the system is Linux.

The system wakes whoever is told of a step where the one who tells runs: there HTTP, and often its client after it,
holds up what all of the engine's other cores wait for. Anywhere else it holds up one, whose part the rest do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable

_LINUX = sys.platform == "linux"
_ALL = os.sched_getaffinity(0) if _LINUX else set[int]()
"""Where this process was started to run."""
_UNKNOWN = -1
_LATE_STEPS, _BEHIND = 64, 0.25
"""Over about so many steps, the share that came together with others from which on it is behind."""

this_core: Callable[[], int] = ctypes.CDLL(None).sched_getcpu if _LINUX else lambda: _UNKNOWN
"""The core that the calling thread runs on now."""


def on_all_cores() -> None:
    """Let the calling thread run anywhere: it has from its maker where that may run."""
    _move(_ALL)


class Apart:
    """Where the calling thread may run: on all cores but one, which now and then is another; or on all, while it is
    behind, as then it needs whatever it can get."""

    def __init__(self) -> None:
        self._left = _UNKNOWN
        self._behind = 0.0
        """How often it was, of late."""

    def heard(self, steps: int, core: int) -> None:
        """Of so many steps at once, the last of them computed on `core`."""
        self._behind += ((steps > 1) - self._behind) / _LATE_STEPS
        if self._behind > _BEHIND and self._left != _UNKNOWN:
            self.end()
        elif core != self._left and self._behind < _BEHIND / 4:
            self._left = core
            _move(_ALL - {core})

    def end(self) -> None:
        """Leave it all cores."""
        self._left = _UNKNOWN
        on_all_cores()


def _move(cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # none is left, or it may not
        if _LINUX:
            os.sched_setaffinity(0, cores)
