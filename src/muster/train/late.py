"""A copy of a rank's state, made while the next step's passes only read it (CheckFreq, Mohan et al. 2021)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from muster.checkpoint.background import Background
from muster.checkpoint.snapshot import Snapshot
from muster.train.trainee import Trainee


class LateCopy:
    """Copies in the background; the optimizer waits until the copy is whole."""

    waited_s = 0.0
    """For the copy begun last."""

    def __init__(self, trainee: Trainee, work: Background, *, owns_whole: bool) -> None:
        self._trainee, self._work = trainee, work
        self._snapshot = Snapshot(trainee.owned(), owns_whole=owns_whole)

    def begin(self, step: int, then: Callable[[Snapshot], None]) -> None:
        """Copy the state after `step` updates, and call `then` with the copy, both in the background."""
        state, copied = self._trainee.owned(), threading.Event()
        self.waited_s = 0.0

        def copy() -> None:
            try:
                self._snapshot.take(state, step)
            finally:
                copied.set()
            then(self._snapshot)

        def wait() -> None:
            begun = time.perf_counter()
            copied.wait()
            self.waited_s += time.perf_counter() - begun

        self._work.start(copy)
        self._trainee.before_change.append(wait)
