"""What a rank waits for, and the messages that it exchanges: told to its heartbeat, kept for whoever asks.

Torch publishes no hook for either, and its recorder knows no messages between two ranks on gloo, of which our gathers,
rings and pipelines are made. So `Work.wait`, `ProcessGroup.send` and `ProcessGroup.recv` are replaced while a rank
trains, here alone; each costs it about a microsecond more. (NCCL's wait returns at once: on GPUs waiting is not told
from computing.)
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from muster.resilience.beats import Beat

_KEPT = 1024


class Messages:
    """The last messages to and from other ranks. A message is a collective of two: both count it by the same name."""

    def __init__(self) -> None:
        self._kept: deque[list[Any]] = deque(maxlen=_KEPT)
        self._counts: dict[str, int] = {}
        self._members: dict[str, list[int]] = {}
        self._open: dict[int, list[Any]] = {}
        self.awaited: list[Any] | None = None
        """The entry of the message that the main thread waits for."""

    def began(self, work: Any, group: Any, peer: int, tensor: Any, tag: int, *, sends: bool) -> None:
        import torch.distributed as dist

        name = group.group_name
        ranks = self._members.get(name)
        if ranks is None:
            ranks = self._members[name] = dist.get_process_group_ranks(group)
        me, other = dist.get_rank(), ranks[peer]
        key = f"{name}:{me}>{other}" if sends else f"{name}:{other}>{me}"
        if tag:
            key += f":{tag}"
        number = self._counts[key] = self._counts.get(key, 0) + 1
        entry = [key, number, time.time_ns(), tensor.numel(), tensor.dtype, False]
        self._kept.append(entry)
        if work is not None:
            self._open[id(work)] = entry

    def entry_of(self, work: Any) -> list[Any] | None:
        return self._open.pop(id(work), None)

    def told(self) -> list[list[Any]]:
        """Each as [group:from>to, number, nanoseconds, elements, dtype, done, awaited], oldest first."""
        told = []
        for entry in list(self._kept):
            *begun, dtype, done = entry
            told.append([*begun, str(dtype).removeprefix("torch."), done, entry is self.awaited])
        return told


@contextlib.contextmanager
def listening(beat: Beat, messages: Messages) -> Iterator[None]:
    """While it lasts, the beat knows when this thread waits for other ranks, and `messages` what it exchanges."""
    import torch.distributed as dist

    main = threading.get_ident()
    honest_wait, group = dist.Work.wait, dist.ProcessGroup
    honest_send, honest_recv = group.send, group.recv

    def wait(work: Any, *arguments: Any, **named: Any) -> Any:
        if threading.get_ident() != main:
            return honest_wait(work, *arguments, **named)
        entry = messages.awaited = messages.entry_of(work)
        began = time.monotonic_ns()
        beat.wait_begins(began)
        try:
            done = honest_wait(work, *arguments, **named)
        finally:
            beat.wait_ends(time.monotonic_ns() - began)
            messages.awaited = None
        if entry is not None:
            entry[-1] = True
        return done

    def noted(honest: Callable[..., Any], *, sends: bool) -> Callable[..., Any]:
        def call(group: Any, tensors: Any, peer: int, tag: int = 0) -> Any:
            work = honest(group, tensors, peer, tag)
            if threading.get_ident() == main:
                messages.began(work, group, peer, tensors[0], tag, sends=sends)
            return work

        return call

    replaced: list[tuple[Any, str, Any, Any]] = [
        (dist.Work, "wait", honest_wait, wait),
        (group, "send", honest_send, noted(honest_send, sends=True)),
        (group, "recv", honest_recv, noted(honest_recv, sends=False)),
    ]
    for owner, name, _, ours in replaced:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for owner, name, honest, _ in replaced:
            setattr(owner, name, honest)
