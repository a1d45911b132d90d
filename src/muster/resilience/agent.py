"""Starts the ranks of one machine through torch's elastic agent: no second launcher to learn.

A rank is `python -m muster <the same arguments>` with RANK set; rank 0 keeps the terminal, the
others write to `logs/` in the run folder. The first failing rank's error becomes the
launcher's: its sentence and its exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from muster.errors import MusterError, Preempted, TrainingError
from muster.resilience.beats import Beat
from muster.resilience.watchdog import Watchdog
from muster.resilience.watched import Watched

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_PR_SET_PDEATHSIG = 1


class RankFailed(MusterError):
    """A rank ended with an error; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start_ranks(arguments: Sequence[str], ranks: int, folder: Path, watchdog: Watchdog) -> None:
    """Run `python -m muster *arguments` as `ranks` processes and wait; RankFailed with the watchdog's verdict.

    `folder` is the run's. Each rank gets its share of the machine's cores as threads unless OMP_NUM_THREADS is set.
    """
    import torch.distributed.launcher.api as launcher
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["MUSTER_AGENT"] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", _threads(ranks))
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    os.environ |= watchdog.environment
    quiet = dict.fromkeys(range(1, ranks), Std.ALL)
    config = launcher.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"muster-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=quiet),
    )
    try:
        with watchdog:
            launcher.elastic_launch(config, entrypoint=sys.executable)("-m", "muster", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        verdict = watchdog.conclude({rank: failed.exitcode for rank, failed in error.failures.items()})
        if verdict is not None:
            raise RankFailed(f"{verdict.sentence}", verdict.exit_code) from None
        raise _explain(rank, failure.exitcode, Path(failure.error_file), logs) from None
    except SignalException as received:
        raise RankFailed(
            f"stopped by {signal.Signals(received.sigval).name}", 128 + received.sigval
        ) from None


@contextlib.contextmanager
def reported() -> Iterator[Beat]:
    """The body of a rank. Does not return: ends the process with 0, or with the error's code and a note for the agent.

    The process ends without the interpreter's tear-down: threads of the process group that still run then
    abort it now and then (seen once in some twenty runs), and after a failure the others may be stuck in a collective.
    """
    _die_with_agent()
    me = Watched()
    try:
        with me.listening():
            yield me.beat
    except Exception as error:
        target = os.environ.get(_ERROR_FILE)
        if target is None:
            raise
        known = isinstance(error, MusterError)
        message = str(error) if known else "".join(traceback.format_exception(error))
        exit_code = error.exit_code if isinstance(error, MusterError) else 1
        Path(target).write_text(json.dumps({"message": message, "exit_code": exit_code}))
        if exit_code != Preempted.exit_code:
            me.failed(message, exit_code)
        _leave(exit_code)
    me.beat.enter("done")
    _leave(0)


def _explain(rank: int, exit_code: int, error_file: Path, logs: Path) -> RankFailed:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return RankFailed(
            f"rank {rank} was killed by {name}; its log is under {logs}: run the same command again to resume",
            TrainingError.exit_code,
        )
    try:
        report = json.loads(error_file.read_text())
        return RankFailed(f"rank {rank}: {report['message']}", report["exit_code"])
    except (OSError, ValueError, KeyError):
        return RankFailed(f"rank {rank} ended with exit code {exit_code}; its log is under {logs}", exit_code)


def _leave(exit_code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _die_with_agent() -> None:
    """Ask Linux to end this rank when its agent dies, so that `kill -9` of the agent leaves no orphans."""
    if not sys.platform.startswith("linux") or "MUSTER_AGENT" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ["MUSTER_AGENT"]):
        os._exit(1)  # the agent died before the request was made


def _threads(ranks: int) -> str:
    from muster.parallel.world import usable_cores

    return str(max(usable_cores() // ranks, 1))
