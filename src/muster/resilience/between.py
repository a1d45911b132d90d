"""What a rank sees of the other replica groups: sums over those that live, which count on all ranks or on none.

Rank i of a group talks to ranks i of the others, through a gloo process group made anew for every epoch; the
coordinator's connection says when that is. It is read while a sum is under way, so a death is noticed
from the coordinator, within milliseconds, and not only where gloo happens to be connected to the dead.

All ranks of a group take in one decision for each sum, in the same order, so they stay in step with each
other even when several epochs begin and end while they compute.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from muster.config.faults import Timeouts
from muster.resilience.beats import Beat
from muster.resilience.lifeline import CutOff
from muster.resilience.membership import View
from muster.resilience.wire import Message, Wire

_CHUNK_ELEMENTS = 1 << 22

COORDINATOR, TOKEN, STORE, GROUP = "MUSTER_COORDINATOR", "MUSTER_TOKEN", "MUSTER_STORE", "MUSTER_GROUP"
"""What a rank of a replica group finds in its environment."""


class Aborted(Exception):
    """The sum does not count, on no rank; the view is new, and what was summed has to be divided and computed anew."""


class Between:
    """This rank's place among the ranks with the same number in the other groups."""

    def __init__(
        self, wire: Wire, *, token: str, group: int, rank: int, store: str, timeouts: Timeouts, beat: Beat
    ) -> None:
        self._beat = beat
        self._wire, self._timeouts, self._rank, self._store = wire, timeouts, rank, store
        self.group = group
        self._view = View(0, 0, (), {})
        self._connecting: _Job | None = None
        self._hello = {"kind": "hello", "token": token, "group": group, "rank": rank}

    @classmethod
    def connect(cls, rank: int, timeouts: Timeouts, beat: Beat) -> Between:
        """From what the environment says; `beat` tells when this rank waits for the other groups."""
        host, port = os.environ[COORDINATOR].rsplit(":", 1)
        wire = Wire(socket.create_connection((host, int(port))))
        token, store, group = os.environ[TOKEN], os.environ[STORE], int(os.environ[GROUP])
        return cls(wire, token=token, group=group, rank=rank, store=store, timeouts=timeouts, beat=beat)

    @property
    def epoch(self) -> int:
        return self._view.epoch

    @property
    def members(self) -> tuple[int, ...]:
        """The groups that take part, the longest member first."""
        return self._view.members

    @property
    def position(self) -> int:
        """This group's index among the members."""
        return self.members.index(self.group)

    @property
    def leads(self) -> bool:
        """True in the one group that saves and reports."""
        return self.members[:1] == (self.group,)

    @property
    def source(self) -> int | None:
        """The group to take the state from, where this one has none."""
        return self._view.sources.get(self.group)

    @property
    def newcomers(self) -> list[int]:
        """The groups that take the state from this one."""
        return [group for group, source in self._view.sources.items() if source == self.group]

    def enter(self, load: Callable[[], None]) -> None:
        """Offer to take part, and wait for the first view; `load` reads the checkpoint, if this group is to do that."""
        self._beat.enter("groups")
        self._send(self._hello)
        while (message := self._receive())["kind"] == "load":
            self._beat.enter("setup")
            load()
            self._beat.enter("groups")
            self._send({"kind": "loaded"})
        self._take_in(message)

    def sum(self, tensors: Sequence[Tensor], *, note: Any = None, last: bool = False) -> None:
        """Sum each of `tensors` over the groups, in place and bitwise equal in all: the sum is committed on return.

        Aborted leaves them as they are. Every rank of every member must call this with tensors of the same shapes.
        `note` goes into the ledger; `last` ends the run. The last sum, and the first of a view in which state is
        handed on, wait `quorum` instead of `collective` seconds for the others.
        """
        self._beat.enter("groups")
        patient = last or bool(self._view.sources)
        limit = timedelta(seconds=self._timeouts.quorum if patient else self._timeouts.collective)
        alone = len(self.members) == 1
        flats = [] if alone else _flatten(tensors)
        ok = alone or self._reduce(flats, limit)
        if ok is not None:
            self._vote(ok=ok, note=note, last=last)
        if not self._take_in(self._receive()):
            raise Aborted
        if not alone:
            _fill(tensors, flats)

    def send(self, group: int, tensors: Sequence[Tensor]) -> bool:
        """Hand tensors to the same rank of another group; False where that failed, which is its loss."""
        self._beat.enter("groups")
        try:
            connection, peer = self._process_group(), self.members.index(group)
            sums = torch.tensor([_checksum(tensor) for tensor in tensors], dtype=torch.int64)
            for number, tensor in enumerate([sums, *tensors]):
                connection.send([_host(tensor)], peer, number).wait()
        except RuntimeError:
            return False
        return True

    def receive(self, tensors: Sequence[Tensor]) -> bool:
        """Fill tensors with those that the source sends; False where they do not arrive whole."""
        assert self.source is not None
        self._beat.enter("groups")
        try:
            connection, peer = self._process_group(), self.members.index(self.source)
            sums = torch.zeros(len(tensors), dtype=torch.int64)
            connection.recv([sums], peer, 0).wait()
            for number, (tensor, checksum) in enumerate(zip(tensors, sums.tolist(), strict=True), 1):
                arriving = torch.empty_like(_host(tensor))
                connection.recv([arriving], peer, number).wait()
                if _checksum(arriving) != checksum:
                    return False
                tensor.copy_(arriving)
        except RuntimeError:
            return False
        return True

    def confirm(self) -> None:
        """Say that this rank has the state now, and can hand it on."""
        self._send({"kind": "holds", "epoch": self.epoch})

    def decline(self) -> None:
        """Drop the round, as this group did not get the state, and take in the next view."""
        self._vote(ok=False)
        self._take_in(self._receive())

    def close(self) -> None:
        self._wire.close()

    def _vote(self, *, ok: bool, note: Any = None, last: bool = False) -> None:
        place = {"epoch": self.epoch, "round": self._view.round}
        self._send({"kind": "vote", **place, "ok": ok, "note": note, "last": last})

    def _reduce(self, flats: list[Tensor], limit: timedelta) -> bool | None:
        """Whether the sums are there; None where the epoch ended before."""
        options = dist.AllreduceOptions()
        options.timeout = limit
        connecting = self._connecting
        assert connecting is not None
        if not self._still_valid_after(connecting):
            return None

        def reduce() -> None:
            works = [connecting.result().allreduce([part], options) for part in _parts(flats)]
            for work in works:
                work.wait()

        job = _Job(reduce)
        if not self._still_valid_after(job):
            return None
        try:
            job.result()
        except RuntimeError:  # gloo's words for a peer that died or did not come
            return False
        return True

    def _still_valid_after(self, job: _Job) -> bool:
        """Wait for a job; False as soon as the coordinator has decided without this rank."""
        while not job.is_done():
            if (
                self._wire_has_message()
            ):  # asked first: it may have been read already, together with the last one
                return False
            select.select([self._wire.fileno(), job.fileno()], [], [])
        return True

    def _take_in(self, message: Message) -> bool:
        """Go on with the view of a decision; True where it committed the round."""
        before = self.epoch
        self._view = View(
            message["epoch"],
            message["round"],
            tuple(message["members"]),
            dict(message["sources"]),
        )
        if self.epoch != before:
            # Dropping the old one closes its connections, which wakes whoever still waits in it.
            self._connecting = _Job(self._make_process_group) if len(self.members) > 1 else None
        return bool(message["committed"])

    def _make_process_group(self) -> Any:
        host, port = self._store.rsplit(":", 1)
        limit = timedelta(seconds=self._timeouts.quorum)
        # A client of its own, because one that waits for a peer's address is deaf to everybody else.
        store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)  # type: ignore[attr-defined]
        prefix = f"epoch-{self.epoch}/rank-{self._rank}"
        return dist.ProcessGroupGloo(PrefixStore(prefix, store), self.position, len(self.members), limit)

    def _process_group(self) -> Any:
        """RuntimeError where not all members of the view can be reached, as a later view will say."""
        assert self._connecting is not None
        if not self._still_valid_after(self._connecting):
            raise RuntimeError("the epoch is over")
        return self._connecting.result()

    def _send(self, message: Message) -> None:
        try:
            self._wire.send(message)
        except ConnectionError as error:
            raise self._cut_off(error) from error

    def _receive(self) -> Message:
        try:
            return self._wire.receive()
        except ConnectionError as error:
            raise self._cut_off(error) from error

    def _wire_has_message(self) -> bool:
        try:
            return self._wire.has_message()
        except ConnectionError as error:
            raise self._cut_off(error) from error

    def _cut_off(self, error: ConnectionError) -> CutOff:
        return CutOff(
            f"group {self.group} is no longer part of the run ({error}): it was too slow, or the run has ended; "
            f"logs/ and events.jsonl say which"
        )


class _Job(threading.Thread):
    """A call in a thread that may be left alone with it: `select` it, and ask for its result."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self._here, self._there = socket.socketpair()
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self._there.close()

    def fileno(self) -> int:
        return self._here.fileno()

    def is_done(self) -> bool:
        return bool(select.select([self._here], [], [], 0)[0])

    def result(self) -> Any:
        """What the call returned, or raised; waits for it."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._value


def _flatten(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the host, those of one type that follow each other in one piece."""
    return [
        torch.cat([_host(tensor).flatten() for tensor in some])
        for _, some in groupby(tensors, key=lambda tensor: tensor.dtype)
    ]


def _fill(tensors: Sequence[Tensor], flats: list[Tensor]) -> None:
    runs = [list(some) for _, some in groupby(tensors, key=lambda tensor: tensor.dtype)]
    for flat, some in zip(flats, runs, strict=True):
        pieces = torch.split(flat, [tensor.numel() for tensor in some])
        for tensor, piece in zip(some, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))


def _parts(flats: list[Tensor]) -> Iterator[Tensor]:
    for flat in flats:
        yield from torch.split(flat, _CHUNK_ELEMENTS)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(_host(tensor).flatten().view(torch.uint8).numpy().data)
