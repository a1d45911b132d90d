"""What ties a rank to the agent that started it: the way to be asked to stop, and the way to say why it ended.

Knows no torch, and works under `torchrun` as well, which sets the same environment and sends the same signals.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from muster.errors import (
    CheckpointError,
    DoesNotFit,
    MusterError,
    ParityError,
    Preempted,
    TrainingError,
    UsageError,
)
from muster.resilience.beats import Beat
from muster.resilience.watched import Watched

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
STEP_FILE = "MUSTER_STEP_FILE"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks for a checkpoint and a clean end; SIGUSR1 is what Slurm is told to send ahead of its time limit."""
INTERRUPTED = 130

_CERTAIN = (UsageError, DoesNotFit, ParityError, CheckpointError)
"""Errors that would come again however often the ranks are restarted."""
_CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "DistNetworkError")
"""What a rank says when another one has died."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_STEP = struct.Struct("<q")


class CutOff(TrainingError):
    """The others have gone on without this rank: it says nothing about why."""


class Lifeline:
    """One rank's end of it. Without a file for its steps, and uninstalled, it does nothing."""

    def __init__(self, step_file: str | None = None) -> None:
        self._file = None if step_file is None else os.open(step_file, os.O_WRONLY | os.O_CREAT, 0o644)
        self.signal: str | None = None
        """Name of the signal that has asked this rank to stop."""
        self.beat = Beat()

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def reached(self, step: int) -> None:
        """Note that `step` updates are done, where the agent finds it even after kill -9."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk; the step only makes a message better
                os.pwrite(self._file, _STEP.pack(step), 0)

    def install(self) -> None:
        """Have STOP_SIGNALS ask for a clean end; a second SIGINT ends this process at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            os._exit(INTERRUPTED)
        self.signal = signal.Signals(number).name


def read_step(path: Path) -> int | None:
    """The step that a rank noted last; None if it had not come that far."""
    try:
        return int(_STEP.unpack(path.read_bytes())[0])
    except (OSError, struct.error):
        return None


@contextlib.contextmanager
def reported() -> Iterator[Lifeline]:
    """The body of a rank. Does not return: ends the process with 0, or with the error's code and a note for the agent.

    The process ends without the interpreter's tear-down: threads of the process group that still run then
    abort it now and then (seen once in some twenty runs), and after a failure the others may be stuck in a collective.
    """
    lifeline = Lifeline(os.environ.get(STEP_FILE))
    lifeline.install()
    watched = Watched()
    lifeline.beat = watched.beat
    try:
        with watched.listening():
            yield lifeline
    except Exception as error:
        target = os.environ.get(ERROR_FILE)
        if target is None:
            raise
        known = isinstance(error, MusterError)
        trace = "".join(traceback.format_exception(error))
        note = {
            "message": str(error) if known else trace,
            "exit_code": error.exit_code if isinstance(error, MusterError) else 1,
            "certain": isinstance(error, _CERTAIN),
            "consequence": isinstance(error, CutOff)
            or (not known and any(words in trace for words in _CONSEQUENCES)),
            "time": time.time(),
        }
        with contextlib.suppress(OSError):  # a full disk: the exit code says some of it
            Path(target).write_text(json.dumps(note))
        if not isinstance(error, Preempted):
            watched.failed(str(note["message"]), int(str(note["exit_code"])))
        _leave(int(str(note["exit_code"])))
    lifeline.beat.enter("done")
    _leave(0)


def die_with_parent(parent: int) -> None:
    """Ask Linux to end this process when `parent` ends, so that `kill -9` of the agent leaves no orphans."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it ended before the request was made


def name_process(name: str) -> None:
    """What `top` and `ps -e` call this process, up to 15 characters; Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


def _leave(exit_code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(exit_code)
