"""The engine in a process of its own, so that HTTP never shares its interpreter lock.

The process ends with its parent, however that ends: the socket between them closes. When the engine's process
ends by itself, its requests fail, and it is started again, unless that has happened too often.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

from muster.errors import DoesNotFit, MusterError, UsageError
from muster.serve.crossing import WAITING_LIMIT, WAITING_S, WAITING_TOKENS, Streams
from muster.serve.engine.cores import Apart
from muster.serve.engine.ear import Ear
from muster.serve.engine.wire import Wire, from_request, to_items
from muster.serve.protocol import Request, Stats, Tokens

_LOG = logging.getLogger(__name__)

RESTARTS, RESTART_WINDOW_S = 3, 600.0
"""So many ends of the engine's process within so many seconds are survived."""

FAREWELL_S = 5.0
"""How long an engine over several ranks may take to end them and itself."""

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""Without it, torch's threads spin for 7 ms after each loop of theirs, on cores that the kernels and HTTP want."""

_ERRORS: dict[str, type[MusterError]] = {
    "DoesNotFit": DoesNotFit,
    "UsageError": UsageError,
}


class Worker:
    """`python -m muster.serve.worker`, begun: it imports what it needs while its setup is still being found out."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        with there:
            command = [sys.executable, "-m", "muster.serve.worker", str(there.fileno())]
            self.process = subprocess.Popen(
                command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, env=ENVIRONMENT | os.environ
            )
        self.wire = Wire(here)
        self._divided = False
        """Whether it may have ranks beside it, which it ends itself when its socket closes."""

    def read_ahead(self, weights: Path, format: str) -> None:
        """Have it begin to read what it is likely to serve."""
        self._send({"ahead": str(weights), "format": format})

    def make(self, setup: dict[str, Any]) -> None:
        """Have it make an engine."""
        self._divided = setup["tensor"] * setup["pipeline"] > 1
        self._send({"setup": setup})

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it has ended already, as whoever waits for it will hear
            self.wire.send(message)

    def end(self) -> None:
        """Have it end, unless it has, and wait for that. A signal's handler may call this wherever Python is: it takes
        no lock that what it interrupts might hold."""
        self.wire.close()
        if not self._divided or not self._has_ended_within(FAREWELL_S):
            self.process.kill()  # it has nothing to lose
            self._has_ended_within(None)

    def _has_ended_within(self, limit_s: float | None) -> bool:
        """What `Popen.wait` would do, of which another call may be under way."""
        until_s = math.inf if limit_s is None else time.monotonic() + limit_s
        with contextlib.suppress(ChildProcessError):  # collected already
            while os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG) is None:
                if time.monotonic() > until_s:
                    return False
                time.sleep(0.002)
        return True


class ProcessEngine:
    """An `Engine` in a process of its own. `setup` is what that makes its core from; `worker` is one begun earlier.

    Returns when it is ready to generate; raises what went wrong there. `on_end` is called, on another thread, when
    it has ended for good.
    """

    def __init__(
        self,
        setup: dict[str, Any],
        worker: Worker | None = None,
        *,
        waiting_limit: int = WAITING_LIMIT,
        waiting_tokens: int = WAITING_TOKENS,
        waiting_s: float = WAITING_S,
        restarts: int = RESTARTS,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._setup, self._restarts, self.on_end = setup, restarts, on_end
        self.failure: str | None = None
        """Why it has ended for good."""
        self.kernels = ""
        """What computes, and why."""
        self._streams = Streams(waiting_limit, waiting_tokens, waiting_s)
        self._stats: dict[str, Any] = {}
        self._closing = False
        self._moves: dict[int, Future[int]] = {}
        self._numbers = itertools.count()
        self._ends: deque[float] = deque(maxlen=restarts + 1)
        self._said: str | None = None
        """Why it ends, in its own words."""
        self._ear, self._apart = Ear(self._heard), Apart()
        self._changed = threading.Lock()  # guards which process it is
        self._process, self._wire = self._start(worker or Worker())
        try:
            self._greet()
        except BaseException:
            self._wire.close()
            self._process.wait()
            raise
        self._watcher = threading.Thread(target=self._watch, name="muster-engine-watcher", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, request: Request) -> Tokens:
        stream = self._streams.open(request)
        self._ear.on_this_loop()
        self._send({"add": from_request(request)})
        return stream

    def check(self) -> None:
        self._streams.check()

    def cancel(self, request_id: str) -> None:
        if self._streams.drop(request_id):
            self._send({"cancel": request_id})

    async def move_blocks(self, path: Path, prompt: tuple[int, ...] = ()) -> int:
        """Give a prompt's blocks to a file or, without one, take those of a file (`engine/transfer.py`): how many."""
        number, future = next(self._numbers), Future[int]()
        self._moves[number] = future
        self._ear.on_this_loop()
        try:
            self._send({"move": [number, str(path), prompt]})
            return await asyncio.wrap_future(future)
        finally:
            del self._moves[number]

    def stats(self) -> Stats:
        return Stats(**self._stats)

    def close(self) -> None:
        self._streams.fail("the engine is stopping")
        with self._changed:
            self._closing = True
            self._wire.end()
        self._watcher.join()
        self._process.wait()
        self._apart.end()

    def _start(self, worker: Worker) -> tuple[subprocess.Popen[bytes], Wire]:
        worker.make(self._setup)
        return worker.process, worker.wire

    def _greet(self) -> None:
        """Wait until the process is ready."""
        greeting = next(self._wire.messages(), None)
        if greeting is None:
            raise MusterError(f"the engine's process {_ending(self._process.wait())} while it was starting")
        if "error" in greeting:
            raise _ERRORS.get(greeting["kind"], MusterError)(greeting["error"])
        self._stats, self.kernels = greeting["stats"], greeting["kernels"]
        self._ear.turn_to(self._wire)

    def _send(self, message: dict[str, Any]) -> None:
        with self._changed:
            try:
                self._wire.send(message)
            except OSError:
                _LOG.debug("the engine's process is gone; its watcher will say so")

    def _heard(self, messages: Sequence[dict[str, Any]]) -> None:
        """Of several steps, where this was behind: what goes to one stream then goes out at once."""
        items: list[Sequence[Any]] = []
        admitted: list[str] = []
        steps, core = 0, -1
        for message in messages:
            if "items" in message:
                items += message["items"]
                admitted += message["admitted"]
                self._stats = message["stats"]
                steps, core = steps + 1, message["core"]
            elif "moved" in message:
                self._moved(*message["moved"])
            else:
                self._said = message["failed"]
        if steps:
            self._apart.heard(steps, core)
        self._streams.deliver(to_items(items), admitted)

    def _watch(self) -> None:
        """On a thread: start the process again when it ends."""
        while True:
            ending = _ending(self._process.wait())
            self._ear.finish(self._wire)
            self._apart.end()  # a new process may run where this thread may
            for number in list(self._moves):
                self._moved(number, 0)
            with (
                self._changed
            ):  # so that whatever is sent goes to the old process and fails, or to the new one
                if self._closing:
                    return
                cause = self._said or f"the engine's process {ending}"
                self._ends.append(time.monotonic())
                if len(self._ends) > self._restarts and self._ends[-1] - self._ends[0] < RESTART_WINDOW_S:
                    times = f", {len(self._ends)} times within {RESTART_WINDOW_S:.0f} s"
                    self._give_up(cause + times * (self._restarts > 0))
                    return
                _LOG.error("%s; it is started again", cause)
                self._stats, self._said = {"ready": False}, None
                self._process, self._wire = self._start(Worker())
                self._streams.fail(f"{cause}; send the request again", for_good=False)
            try:
                self._greet()
            except MusterError as error:
                self._wire.close()
                self._give_up(f"{cause}, and could not be started again: {error}")
                return

    def _moved(self, number: int, blocks: int) -> None:
        if (future := self._moves.get(number)) is not None:
            with contextlib.suppress(InvalidStateError):  # whoever asked has gone
                future.set_result(blocks)

    def _give_up(self, cause: str) -> None:
        self.failure = cause
        self._streams.fail(cause)
        self.on_end()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"
