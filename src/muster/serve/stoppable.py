"""SIGTERM while a server starts: the engine's process is ended and waited for, and then this one, at once.

All of that is done by the signal's handler. An exception from there would come up wherever Python is: in the midst of
starting a process, which nobody would end then, or in a destructor, which swallows it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from muster.serve.engine.process import Worker


@contextlib.contextmanager
def stoppable_worker() -> Iterator[Worker]:
    """The engine's process, begun, until the end of the block; SIGTERM is the end of both, until the server listens
    to it."""
    worker: Worker | None = None
    asked = False

    def leave(worker: Worker) -> NoReturn:
        worker.end()
        os._exit(0)

    def on_sigterm() -> None:
        nonlocal asked
        asked = True
        if worker is not None:
            leave(worker)

    with _on_sigterm(on_sigterm):
        worker = Worker()
        if asked:  # while it was being started
            leave(worker)
        try:
            yield worker
        finally:
            worker.end()
            worker.process.wait()


@contextlib.contextmanager
def _on_sigterm(call: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where signals do not arrive
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
