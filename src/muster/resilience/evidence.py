"""What is known of a rank when something is wrong: plain data, from its heartbeat, its process and torch's recorder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from muster.resilience.beats import Phase

_FOLLOWS = re.compile(
    r"Connection (reset|closed|refused)|closed by peer|Broken pipe|Timed out waiting|Socket Timeout|"
    r"wait timeout after|recvBytes|sendBytes|Read error|Write error|NCCL communicator was aborted|"
    r"no longer part of the run",
)
_SAME_SHAPES = {"message", "all_reduce", "all_gather", "broadcast", "reduce", "reduce_scatter"}
"""Collectives in which every member gives a tensor of the same shape."""
_FOREIGN = re.compile(r"site-packages|/lib/python3|/resilience/listening\.py|<frozen|<string>")
_FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """One entry of torch's flight recorder."""

    group: str
    number: int
    """Its place among the group's collectives, from 1; the same on every member that does the same."""
    operation: str
    """As gloo names it: a reduce-scatter is an all_reduce there."""
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    done: bool = False
    backend: str = "gloo"
    time_ns: int = 0
    """When it was begun, since the epoch."""
    awaited: bool = False
    """Whether the main thread is known to wait for this one."""

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same on every member."""
        if self.operation not in _SAME_SHAPES:
            return (self.operation,)
        return self.operation, self.shapes, self.dtypes

    def __str__(self) -> str:
        tensors = ", ".join(
            f"{'x'.join(map(str, shape)) or 'scalar'} {dtype.lower()}"
            for shape, dtype in zip(self.shapes, self.dtypes, strict=False)
        )
        ends = (
            f" from {' to '.join(self.group.split(':')[1].split('>'))}" if self.operation == "message" else ""
        )
        return f"{self.operation}({tensors}){ends}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """How a rank ended, or is ending."""

    message: str = ""
    """Its sentence, or its traceback."""
    exit_code: int = 1
    """Negative: the signal that ended it."""
    crash: str = ""
    """Its Python stacks where a signal such as SIGABRT ended it."""

    @property
    def follows(self) -> bool:
        """Whether it only says that another rank has gone, or does not answer."""
        return bool(_FOLLOWS.search(self.message.strip().rsplit("\n", 1)[-1]))

    @property
    def last_line(self) -> str:
        return self.message.strip().rsplit("\n", 1)[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Witness:
    """One rank."""

    rank: int
    step: int = 0
    phase: Phase = "setup"
    in_phase_s: float = 0.0
    waiting: bool = False
    """Whether its main thread waits for other ranks."""
    process: str = "S"
    """The state of its process as Linux names it (`man proc`): R, S, D, T, t, Z; "" when it is gone."""
    collectives: tuple[Collective, ...] | None = None
    """The recorder's tail, and messages, oldest first; None where the rank did not answer."""
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Members of the process groups that it knows, by name."""
    stack: str = ""
    """Python stacks of its threads as faulthandler writes them, the main thread's last."""
    failure: Failure | None = None

    @property
    def stopped(self) -> bool:
        return self.process in ("T", "t")

    @property
    def pending(self) -> Collective | None:
        """What it waits for: a message, or the first collective that it has begun and not finished."""
        calls = self.collectives or ()
        awaited = next((c for c in calls if c.awaited), None)
        return awaited or next((c for c in calls if not c.done and c.operation != "message"), None)

    @property
    def where(self) -> str:
        """The line of the user's or our code that the main thread is in; empty if unknown."""
        return location(self.stack or (self.failure.crash if self.failure else ""))


def location(stack: str) -> str:
    """`file.py:12 in function` of the innermost frame outside torch and Python's library, in faulthandler's text."""
    frames = [found for line in main_thread(stack) if (found := _FRAME.match(line))]
    own = [frame for frame in frames if not _FOREIGN.search(frame["file"])]
    for frame in own or frames:
        return f"{frame['file'].rsplit('/', 1)[-1]}:{frame['line']} in {frame['function']}"
    return ""


def main_thread(stack: str) -> list[str]:
    """The lines of the main thread, which faulthandler writes last."""
    heads = re.split(r"^(?:Current thread|Thread) 0x.*$", stack, flags=re.MULTILINE)
    return [line for line in heads[-1].splitlines() if line.startswith("  ")]


def parse_messages(told: Sequence[Sequence[Any]]) -> tuple[Collective, ...]:
    """What `Messages.told` wrote."""
    return tuple(
        Collective(
            group=group,
            number=number,
            operation="message",
            shapes=((elements,),),
            dtypes=(dtype,),
            done=done,
            awaited=awaited,
            time_ns=time_ns,
        )
        for group, number, time_ns, elements, dtype, done, awaited in told
    )


def parse_recorder(text: str) -> tuple[Collective, ...]:
    """The entries of the flight recorder's JSON, as torch 2.13 writes it, oldest first."""
    entries = sorted(json.loads(text).get("entries", []), key=lambda entry: entry["record_id"])
    return tuple(
        Collective(
            group=str(entry["process_group"][0]),
            number=entry["collective_seq_id"],
            backend=entry["profiling_name"].split(":", 1)[0],
            operation=entry["profiling_name"].rsplit(":", 1)[-1],
            shapes=tuple(tuple(shape) for shape in entry["input_sizes"]),
            dtypes=tuple(entry["input_dtypes"]),
            done=bool(entry["retired"]),
            time_ns=entry["time_created_ns"],
        )
        for entry in entries
        if not entry["is_p2p"]
    )
