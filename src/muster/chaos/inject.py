"""Faults of processes and files, done to them by the system: signals, limits and bits. No root is needed.

Processes are those that descend from the one that the caller started; a number that the system has given to
somebody else meanwhile is never touched (`psutil.Process` compares when it was started).
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from muster.observe.records import EVENTS, read_jsonl

_SLICE_S = 0.02
_STOPPED_SHARE = 0.8


def ranks_of(agent: int) -> dict[int, psutil.Process]:
    """The ranks that an agent (ours or `torchrun`) keeps now, by their number."""
    found = {}
    for child in _children(agent):
        with contextlib.suppress(psutil.Error):
            name = child.name()
            rank = name.removeprefix("rank-") if name.startswith("rank-") else child.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = child
    return dict(sorted(found.items()))


def ranks_of_groups(agent: int, folder: Path) -> dict[int, psutil.Process]:
    """The same where replica groups train (`faults.elastic`), as the run's events tell them."""
    groups: dict[int, list[int]] = {}
    for event in read_jsonl(folder / EVENTS):
        if event.get("event") == "group-started":
            groups[int(event["group"])] = [int(pid) for pid in event["pids"]]
    alive = {child.pid: child for child in _children(agent)}
    return {
        group * len(pids) + rank: alive[pid]
        for group, pids in sorted(groups.items())
        for rank, pid in enumerate(pids)
        if pid in alive
    }


def _children(agent: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(agent).children(recursive=True)
    return []


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether it was still there to get the signal."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
        return True
    return False


@contextlib.contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Within its context, they are stopped by SIGSTOP."""
    for process in processes:
        send(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            send(process, signal.SIGCONT)


@contextlib.contextmanager
def slowed(process: psutil.Process) -> Iterator[None]:
    """Within its context, it runs a fifth of the time: SIGSTOP and SIGCONT, again and again."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(_SLICE_S * (1 - _STOPPED_SHARE)):
            if not send(process, signal.SIGSTOP):
                return
            over.wait(_SLICE_S * _STOPPED_SHARE)
            send(process, signal.SIGCONT)

    thread = threading.Thread(target=work, name="muster-slow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        send(process, signal.SIGCONT)


@contextlib.contextmanager
def disk_full(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Within its context, no file takes another byte from them: the kernel's limit of a file's size is 0 (EFBIG).

    What they have open fails as well, as on a full disk; folders can be made, files be renamed and deleted.
    """
    before = []
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
            before.append((process, soft, hard))
    try:
        yield
    finally:
        for process, soft, hard in before:
            with contextlib.suppress(ProcessLookupError):
                if process.is_running():
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))


def flip_bit(path: Path, chance: random.Random) -> int:
    """Flip one bit of a file in place; the byte it is in."""
    with path.open("r+b") as file:
        where = chance.randrange(path.stat().st_size)
        file.seek(where)
        (byte,) = file.read(1)
        file.seek(where)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return where
