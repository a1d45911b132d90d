"""A rank's side of the watchdog: its heartbeat, and what it leaves for the agent to read when something is wrong.

Nothing here waits for the main thread, which is the one that is stuck: Python stacks are written by a signal handler in
C (SIGUSR2), torch's flight recorder by a thread that looks for a request five times a second. A stopped rank can do
neither; its heartbeat stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from muster.resilience.beats import Beat
from muster.resilience.listening import Messages, listening

BEATS, FIRST, POST = "MUSTER_BEATS", "MUSTER_FIRST", "MUSTER_POST"
"""Environment of a watched rank: the board's path, the rank of its first row, and the folder for what it leaves."""
STACK, CRASH, RECORDER, FAILURE = "stack-{}.txt", "crash-{}.txt", "recorder-{}.json", "failure-{}.json"

_POLL_S = 0.2
_RELEASE_S = 5.0


class Watched:
    """Made at the start of a rank. Without a watchdog in the environment it does nothing but beat for itself."""

    def __init__(self) -> None:
        self._rank = int(os.environ.get("RANK", "0"))
        self._messages = Messages()
        folder = os.environ.get(POST)
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            self.beat = Beat()
            return
        self._files = [self._open(STACK), self._open(CRASH)]  # kept open for the handlers
        faulthandler.register(signal.SIGUSR2, file=self._files[0], all_threads=True)
        _outlive_abort()
        faulthandler.enable(file=self._files[1], all_threads=True)
        self.beat = Beat(os.environ[BEATS], slot=self._rank - int(os.environ[FIRST]), rank=self._rank)
        threading.Thread(target=self._answer, name="muster-watched", daemon=True).start()

    def listening(self) -> AbstractContextManager[None]:
        """While it lasts, what this thread waits for and exchanges is known."""
        return listening(self.beat, self._messages)

    def failed(self, message: str, exit_code: int) -> None:
        """Say why this rank ends, and stay until the agent has taken down what all ranks know, or for some seconds."""
        if self._folder is None:
            return
        _write(self._folder / FAILURE.format(self._rank), {"message": message, "exit_code": exit_code})
        self.beat.enter("failed")
        deadline = time.monotonic() + _RELEASE_S
        while not self.beat.released and time.monotonic() < deadline:
            time.sleep(0.02)

    def _open(self, name: str) -> int:
        assert self._folder is not None
        return os.open(
            self._folder / name.format(self._rank), os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o644
        )

    def _answer(self) -> None:
        assert self._folder is not None
        answered = self.beat.requested
        while True:
            time.sleep(_POLL_S)
            if (number := self.beat.requested) != answered:
                answered = number
                with contextlib.suppress(OSError):
                    content = {
                        "request": number,
                        "recorder": recorder_tail(),
                        "groups": _groups(),
                        "messages": self._messages.told(),
                    }
                    _write(self._folder / RECORDER.format(self._rank), content)


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """The body of a rank: beats, and tells the agent of an error that passes through."""
    me = Watched()
    with me.listening():
        yield me
    me.beat.enter("done")


def recorder_tail() -> str:
    """Torch's flight recorder as JSON; private in torch, whose published form of it is a pickle."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return '{"entries": []}'
    text = dump(True, False)
    return text if isinstance(text, str) else bytes(text).decode()


def _groups() -> dict[str, list[int]]:
    """Members of this rank's process groups by the name that the recorder uses; private, because torch lists none."""
    from torch.distributed import distributed_c10d as c10d

    return {name: list(c10d.get_process_group_ranks(group)) for group, name in c10d._world.pg_names.items()}


def _outlive_abort() -> None:
    """Have a thread that aborts sleep for some seconds first, so that the rank can still say what it was doing.

    Gloo ends the process from a thread of its own when a peer sends more than it expects. The handler that sleeps is
    libc's `sleep` itself, called with the signal's number: six seconds, and no Python in a broken process.
    """
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _write(path: Path, content: dict[str, object]) -> None:
    draft = path.with_suffix(".partial")
    draft.write_text(json.dumps(content))
    draft.rename(path)
