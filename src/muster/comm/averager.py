"""Means over copies of a model that train apart: the protocol, and the one over a plain process group.

Whoever averages (`train/rounds.py`, `train/delayed.py`) knows no groups, so that copies can as well be
replica groups that come and go.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from muster.comm.choice import Form
from muster.comm.int8 import Int8AllReduce


class Averager(Protocol):
    """Each copy's same place calls in the same order with messages of the same sizes."""

    def start(self, messages: Sequence[Tensor]) -> Future[list[Tensor]]:
        """Begin to average flat fp32 `messages`, each by itself; they are read but kept as they are.

        The result is new tensors, the same bits on every copy. Where copies can be lost, it comes to all that remain or
        to none: an exception then leaves everything as it was, and the same call may be made again, with whichever
        copies there are by then.
        """


class GroupAverager:
    """Over the members of a process group that nobody else uses. A member that dies ends the others' training.

    In the background it leaves the caller free to go on; otherwise `start` returns with the result.
    """

    def __init__(self, group: dist.ProcessGroup, form: Form, *, in_background: bool) -> None:
        self._group, self._form, self._in_background = group, form, in_background

    def start(self, messages: Sequence[Tensor]) -> Future[list[Tensor]]:
        result: Future[list[Tensor]] = Future()
        if self._in_background:
            # Dies with the process: what never comes, because a member died, must not keep the others from ending.
            threading.Thread(target=self._fill, args=(result, messages), daemon=True).start()
        else:
            self._fill(result, messages)
        return result

    def _fill(self, result: Future[list[Tensor]], messages: Sequence[Tensor]) -> None:
        try:
            result.set_result([self._mean(message) for message in messages])
        except BaseException as error:
            result.set_exception(error)

    @torch.no_grad()
    def _mean(self, message: Tensor) -> Tensor:
        copies = self._group.size()
        if self._form == "int8":
            mean = message.clone()
            # Used once, so that it remembers nothing: `train/rounds.py` says why there is no error feedback.
            Int8AllReduce(self._group)(mean)
            return mean
        if self._form == "fp16":
            half = message.div(
                copies
            ).half()  # before the sum, so that it cannot overflow where no message does
            dist.all_reduce(half, group=self._group)
            return half.float()
        mean = message.clone()
        dist.all_reduce(mean, group=self._group)
        return mean.div_(copies)
