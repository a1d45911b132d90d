"""One piece of work at a time in a thread of its own, which nobody waits for until somebody wants to.

A thread, not a process: hashing, writing and syncing release the interpreter's lock, so what is left to contend for
are the cores, which a process needs as much (`benchmarks/checkpoint_cpu.py` measures both). Its priority is not
lowered: where other programs keep the machine busy they starve it (measured: a save of 2 s took 76 s), and a checkpoint
that is late is one that is missing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from muster.errors import MusterError

Failure = MusterError | OSError


class Background:
    """What stops the work is kept for whoever asks; what is neither an OSError nor one of ours is raised there."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the last work is over and failed, and nobody has asked why."""
        return not self.busy and self._error is not None

    def start(self, work: Callable[[], None], *, here: bool = False) -> None:
        """Begin `work`; with `here`, do it before returning. What was done before must have been taken."""
        assert self._thread is None
        assert self._error is None
        if here:
            self._run(work)
            return
        # A daemon: a process that ends for another reason does not wait for files that nobody would commit.
        self._thread = threading.Thread(target=self._run, args=(work,), name="muster-save", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def take(self) -> Failure | None:
        """Wait for the work, if there is any, and return what stopped it; after that there may be a next one."""
        self.wait()
        error, self._thread, self._error = self._error, None, None
        if error is not None and not isinstance(error, Failure):
            raise error
        return error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
