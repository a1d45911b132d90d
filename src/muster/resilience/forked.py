"""Short-lived local ranks, forked in tenths of a second from a process that has torch loaded already.

For checks that start many small worlds one after the other (`muster verify`). A run's ranks are started by the agent.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muster.errors import TrainingError

PRELOADED = ["muster.train.preloaded"]
_POLL_S = 0.02


class ForkedRanks:
    """Makes worlds of ranks, fresh processes each time."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def run(
        self, ranks: int, work: Callable[..., None], *arguments: Any, errors: Path, timeout_s: float
    ) -> None:
        """Call work(*arguments) on `ranks` ranks, which find their place in the environment; wait for all.

        TrainingError with the traceback of the first rank that fails, whose file is `errors`; the others are ended.
        """
        errors.unlink(missing_ok=True)
        port = free_port()
        processes = [
            self._context.Process(
                target=_rank, args=(rank, ranks, port, errors, work, arguments), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            self._wait(processes, errors, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()

    def _wait(self, processes: list[Any], errors: Path, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode not in (None, 0) for process in processes):
                break
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the ranks were not done within {timeout_s:.0f} s: ask for fewer steps, or end what else runs here"
                )
            time.sleep(_POLL_S)
        for rank, process in enumerate(processes):
            if process.exitcode not in (None, 0):
                said = (
                    errors.read_text() if errors.exists() else f"it ended with exit code {process.exitcode}"
                )
                raise TrainingError(f"rank {rank} of {len(processes)} failed: {said.strip()}")


def _rank(
    rank: int, ranks: int, port: int, errors: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        work(*arguments)
    except Exception:
        if not errors.exists():  # the first failure is the cause, what peers say follows from it
            errors.write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _end_with_parent() -> None:
    """Whatever ends the process that asked for ranks, `kill -9` too: the one that forked them waits for them."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def free_port() -> int:
    """Below those that systems give out by themselves: somebody's connection would take one before a rank does."""
    with socket.socket() as probe:
        while True:
            try:
                probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(10_000)))
            except OSError:
                continue
            return int(probe.getsockname()[1])
