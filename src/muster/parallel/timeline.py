"""Pipeline stages that can say when they worked: each forward, backward and weight gradient, without the waits.

Torch calls a stage once its input has arrived, so what is measured is computation (with what FSDP gathers within
it) and never the wait for another stage.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from muster.parallel.simulate import Kind, Operation

OnPass = Callable[[Literal["forward", "backward"]], None]
"""Told on every rank when a pass of a microbatch begins, by whoever wants to know how far a step is."""


def ignore_pass(_: Literal["forward", "backward"]) -> None:
    pass


class Clock:
    """Seconds since the epoch, so that ranks compare, but never set back; on a GPU, of its stream."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._epoch_s = time.time() - time.perf_counter()
        if self._on_gpu:
            torch.cuda.synchronize(device)
            self._epoch_s = time.time()
            self._zero = self.now()

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, instant: Any) -> float:
        """When an instant was; on a GPU it waits until it has been."""
        if not self._on_gpu:
            return float(self._epoch_s + instant)
        instant.synchronize()
        return float(self._epoch_s + self._zero.elapsed_time(instant) / 1000)


@dataclass(slots=True)
class Recorder:
    """What the stages of one rank did, while it is set on them."""

    rank: int
    clock: Clock
    _marks: list[tuple[int, Kind, int, Any, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def measure(self, stage: int, kind: Kind, microbatch: int) -> Iterator[None]:
        start = self.clock.now()
        yield
        self._marks.append((stage, kind, microbatch, start, self.clock.now()))

    def operations(self) -> list[Operation]:
        """Everything so far, in the order in which it was done."""
        seconds = self.clock.seconds
        return [
            Operation(self.rank, stage, kind, microbatch, seconds(start), seconds(end))
            for stage, kind, microbatch, start, end in self._marks
        ]


class RecordedStage(PipelineStage):
    """Torch's stage; while `recorder` is set, it is told of every operation. Sends views as well.

    `on_pass` is always called, with the name of the pass that begins.
    """

    recorder: Recorder | None = None
    on_pass: OnPass = staticmethod(ignore_pass)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.on_pass("forward")
        with self._measure("F", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        self.on_pass("backward")
        with self._measure("B" if full_backward else "I", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        self.on_pass("backward")
        with self._measure("W", bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return _contiguous(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return _contiguous(super().get_bwd_send_ops(bwd_chunk_id))

    def _measure(self, kind: Kind, microbatch: int) -> contextlib.AbstractContextManager[None]:
        if self.recorder is None:
            return contextlib.nullcontext()
        return self.recorder.measure(self.stage_index, kind, microbatch)


def _contiguous(sends: list[dist.P2POp]) -> list[dist.P2POp]:
    """Back ends refuse to send a view, such as a part of the tokens of hidden states (B, T, E)."""
    for send in sends:
        send.tensor = send.tensor.contiguous()
    return sends
