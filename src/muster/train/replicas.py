"""Copies of a run's state in the memory of its nodes: refreshed while training goes on, and what ranks restart from.

At an exchange that says so, each rank copies its shards as for a checkpoint; a thread writes the copy to the memory of
its node, which outlives the rank, and sends it to the nodes that follow in the ring (Gemini, Wang et al. 2023). At a
later exchange all ranks learn that all have done so; then the first rank's thread commits the generation on each node.
The one before stays until the next one is begun, so two are there, or one and another being written.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil

from muster.checkpoint.background import Background
from muster.checkpoint.manifest import Manifest
from muster.checkpoint.memory import Generation
from muster.checkpoint.peers import Neighbours
from muster.checkpoint.snapshot import Snapshot, arrange
from muster.checkpoint.state import file_of
from muster.errors import MusterError
from muster.observe.format import size
from muster.observe.records import RunLog
from muster.parallel.world import World
from muster.train.describe import describe
from muster.train.late import LateCopy
from muster.train.pace import Pace
from muster.train.plan import Training
from muster.train.report import Report
from muster.train.trainee import Trainee

_GENERATIONS = 2


@dataclass(slots=True)
class _Flight:
    generation: Generation
    begun: float
    stall_s: float
    content: Manifest
    """Without files, which each node knows of itself."""


class Replicas:
    """The refreshing; like `saves.Saver` it hears at each exchange how it goes, and no thread talks to another rank."""

    def __init__(self, trainee: Trainee, plan: Training, world: World, report: Report, *, step: int) -> None:
        """`step` is the one that training begins or resumes at: of what was resumed, copies are made at once."""
        self._trainee, self._plan, self._world, self._report = trainee, plan, world, report
        self._work = Background()
        self._due, self._told = step > 0, False
        self._flight: _Flight | None = None
        self._committing: _Flight | None = None
        self._asked = step
        self._late: LateCopy | None = None
        if plan.run.checkpoint.memory == "none":
            return
        self._neighbours = Neighbours.from_environment()
        if not all_say(world, self._neighbours is not None):
            return
        whole = trainee.mesh.is_first_of_stage
        self._size_bytes = arrange(trainee.owned(), owns_whole=whole).size_bytes
        why_not = self._why_not()
        if all_say(world, why_not is None):
            self._pace = Pace(plan, world, report, key="memory")
            self._late = LateCopy(trainee, self._work, owns_whole=whole)
        else:
            report.note(
                "memory-off", f"no copies are kept in memory: {why_not or 'a rank has no room for its own'}"
            )

    def votes(self, step: int) -> tuple[float, float, float]:
        """This rank's part of the exchange after `step`: a refresh is due, is under way, has failed."""
        if self._late is None:
            return 0.0, 0.0, 0.0
        if self._world.is_first and step != self._asked and self._pace.rings(step):
            self._due = True
        self._asked = step
        return float(self._due), float(self._work.busy), float(self._work.failed)

    def after(self, step: int, votes: Sequence[float]) -> None:
        """With the sums of all ranks' votes after `step`: finish what can be, and begin what is due."""
        due, busy, failed = votes
        if self._flight is not None and not busy:
            self._settle(bool(failed))
            busy = not failed  # on the first rank, of which the others hear in the next exchange
        self._hear()
        if due and not busy:
            self._begin(step)

    def drain(self) -> None:
        """Wait until nothing is under way on any rank. All ranks must call."""
        self._work.wait()
        if self._flight is not None:
            (failed,) = self._world.sum(self._work.failed)
            self._settle(bool(failed))
        self._work.wait()
        self._hear()

    def _begin(self, step: int) -> None:
        assert self._late is not None
        assert self._neighbours is not None
        generation = Generation(self._neighbours.attempt, step)
        self._trainee.check_copies(step)  # so that nothing is restored that its copies contradict
        begun = time.perf_counter()
        self._trainee.beat.enter("save")
        self._due = False
        self._late.begin(step, lambda copy: self._spread(generation, copy))
        self._trainee.model.forget_residuals()
        content = replace(describe(self._plan, step, {}), guard=self._trainee.guard.state())
        self._flight = _Flight(generation, begun, time.perf_counter() - begun, content)

    def _spread(self, generation: Generation, copy: Snapshot) -> None:
        """Runs in the background: this rank's file to its node's memory, and to as many others as are wanted."""
        assert self._neighbours is not None
        name = file_of(self._world.rank)
        summed = self._neighbours.own.put(generation, name, copy.pieces())
        others = self._neighbours.others
        missing = min(self._plan.run.checkpoint.replicas, len(others))
        why = ""
        for peer in others:
            if not missing:
                break
            try:
                peer.put(generation, name, summed, copy.pieces())
                missing -= 1
            except (OSError, MusterError) as error:
                why = f"{peer}: {error}"
        if missing:
            raise OSError(f"no other node took the copy of rank {self._world.rank} ({why})")

    def _settle(self, failed: bool) -> None:
        """All ranks have copied, or have failed to."""
        flight, self._flight = self._flight, None
        assert flight is not None
        error = self._work.take()
        if error is not None:
            self._tell(flight.generation.step, str(error))
        elif failed and self._world.is_first:
            self._tell(flight.generation.step, "another rank could not copy its part, its log says why")
        if not failed and self._world.is_first:
            self._committing = flight
            self._work.start(lambda: self._commit(flight))

    def _commit(self, flight: _Flight) -> None:
        """Runs in the background, on the first rank."""
        assert self._neighbours is not None
        self._neighbours.own.commit(flight.generation, flight.content)
        for peer in self._neighbours.others:
            # A node that is gone: if its ranks are, this attempt is over; if it was a spare, it has nothing to commit.
            with suppress(OSError):
                peer.commit(flight.generation, flight.content)

    def _hear(self) -> None:
        """On the first rank: tell what became of a generation that was being committed, once that is over."""
        if self._committing is None or self._work.busy:
            return
        flight, self._committing = self._committing, None
        error = self._work.take()
        if error is not None:
            self._tell(flight.generation.step, str(error))
            return
        self._told = False
        seconds = time.perf_counter() - flight.begun
        assert self._late is not None
        stall_s = flight.stall_s + self._late.waited_s
        self._report.event("memory", step=flight.generation.step, seconds=seconds, stall_s=stall_s)
        self._pace.measured(stall_s, seconds)

    def _tell(self, step: int, why: str) -> None:
        if not self._told:
            sentence = f"step {step} is not copied to memory, the copies before it are untouched: {why}"
            tell(self._plan, self._world, self._report, "memory-failed", sentence)
        self._told = True

    def _why_not(self) -> str | None:
        assert self._neighbours is not None
        if self._plan.layout.offload == "disk":
            return "layout.offload: disk says that memory is wanting"
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        copies = 1 + min(self._plan.run.checkpoint.replicas, len(self._neighbours.others))
        needed = _GENERATIONS * copies * self._size_bytes
        own = self._neighbours.own
        held = own.size_bytes()  # which makes room
        for where, wanted, free in (
            (str(own.root.parent), needed, shutil.disk_usage(own.root).free + held),
            ("memory", needed + self._size_bytes, psutil.virtual_memory().available // 2 + held),
        ):
            if wanted > free // ranks:
                return (
                    f"a rank's {_GENERATIONS} generations, with {copies - 1} copies for others, need {size(wanted)}, "
                    f"but its share of {where} is {size(free // ranks)}: give it more, or write checkpoint.memory: none"
                )
        return None


def all_say(world: World, this: bool) -> bool:
    """Whether it holds on all ranks; all must ask."""
    (no,) = world.sum(not this)
    return not no


def tell(plan: Training, world: World, report: Report, kind: str, sentence: str) -> None:
    """A note of any rank in the run's events; the first one's for the terminal too, the others' for their logs."""
    if world.is_first:
        report.note(kind, sentence)
        return
    log = RunLog(plan.folder)
    log.event(kind, message=sentence, rank=world.rank)
    log.close()
    sys.stdout.write(sentence + "\n")
    sys.stdout.flush()
