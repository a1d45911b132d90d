"""Replicas as processes of this machine: started, watched, started again when they end, and ended.

A thread for each waits for what its process says and for its end; what it learns is told to the event loop. A
replica ends with the router, however that ends: the pipe between them closes (`child.py`).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from muster.errors import MusterError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before a replica is started again; twice as long each time, up to this,"""
SETTLED_S = 60.0
"""and anew after it has lived so long."""
END_S = 40.0
"""Time a replica has to end: longer than it takes to finish its requests."""

Told = Callable[[int, str | None], None]
"""(which replica, where it listens; None: it is gone)."""


class Supervisor:
    """Runs `muster serve ARGUMENTS` as often as there are `replicas`, with `environment` besides our own.

    The first is started alone, as it may have to make what the others find: packed weights, compiled kernels. When it
    ends before it was ready, so does everything: `failure` says why, and `on_failure` is called. Callbacks come from
    threads.
    """

    def __init__(
        self,
        replicas: int,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        told: Told,
        say: Callable[[str], None],
        on_failure: Callable[[], None],
    ) -> None:
        self._arguments, self._told, self._say, self._on_failure = arguments, told, say, on_failure
        self._environment = {**os.environ, **environment}
        self.failure: MusterError | None = None
        self._closing = threading.Event()
        self._first_ready = threading.Event()
        self._changed = threading.Lock()
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._threads = [
            threading.Thread(target=self._keep, args=(index,), name=f"muster-replica-{index}", daemon=True)
            for index in range(replicas)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def pids(self) -> dict[int, int]:
        """Process ids of those that run, by replica."""
        with self._changed:
            return {index: process.pid for index, process in self._processes.items()}

    def kill(self, index: int) -> None:
        """End a replica that has stopped answering; it is started again."""
        with self._changed:
            if index in self._processes:
                self._processes[index].kill()

    def close(self) -> None:
        """End all replicas; returns when they have."""
        self._closing.set()
        self._first_ready.set()
        with self._changed:
            for process in self._processes.values():
                process.terminate()
        until_s = time.monotonic() + END_S
        for index, thread in enumerate(self._threads):
            if thread.ident is not None:
                thread.join(max(0.0, until_s - time.monotonic()))
                if thread.is_alive():
                    self.kill(index)
                    thread.join()

    def _keep(self, index: int) -> None:
        """On a thread: one replica's lives, one after the other."""
        if index > 0:
            self._first_ready.wait()
        pause_s = FIRST_PAUSE_S
        while not self._closing.is_set():
            started_s = time.monotonic()
            process, lifeline = self._start(index)
            if process is None:
                break
            try:
                self._listen(index, process)
                code = process.wait()
            finally:
                os.close(lifeline)
                with self._changed:
                    del self._processes[index]
            self._told(index, None)
            if self._closing.is_set():
                break
            if not self._first_ready.is_set():
                self.failure = MusterError(
                    f"the first replica {_ending(code)} before it was ready: see above"
                )
                self._on_failure()
                break
            lived_s = time.monotonic() - started_s
            pause_s = FIRST_PAUSE_S if lived_s > SETTLED_S else pause_s
            self._say(
                f"replica {index} {_ending(code)} after {lived_s:.0f} s; starting it again in {pause_s:g} s"
            )
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _start(self, index: int) -> tuple[subprocess.Popen[str] | None, int]:
        theirs, ours = os.pipe()
        command = [sys.executable, "-m", "muster.serve.router.child", str(theirs), "serve", *self._arguments]
        try:
            with self._changed:
                if self._closing.is_set():
                    os.close(ours)
                    return None, -1
                # A session of its own: Ctrl-C is for the router, which lets requests come to their end first.
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs],
                    stdin=subprocess.DEVNULL,
                    env=self._environment,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                self._processes[index] = process
        finally:
            os.close(theirs)
        return process, ours

    def _listen(self, index: int, process: subprocess.Popen[str]) -> None:
        """Pass on what a replica says, until it ends; one line tells where it listens."""
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._say(f"replica {index}: {line.rstrip()}")
                if found := re.match(r"serving .* on (https?://\S+)", line):
                    self._told(index, found[1])
                    self._first_ready.set()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
