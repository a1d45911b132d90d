"""A run's checkpoints during training: resume from the newest sound one, save on the way and at the end, retain."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import psutil

from muster.checkpoint import manifest, shelf
from muster.checkpoint.background import Background
from muster.checkpoint.manifest import Manifest
from muster.checkpoint.memory import Generation
from muster.checkpoint.snapshot import arrange
from muster.checkpoint.state import collect_sums, refusals, refused, write_file, write_shards
from muster.config.digest import differences, identity
from muster.errors import CheckpointError, DoesNotFit, MusterError, Preempted
from muster.observe.format import size
from muster.parallel.world import World
from muster.train.describe import describe
from muster.train.evaluate import Evaluation
from muster.train.late import LateCopy
from muster.train.pace import Pace
from muster.train.plan import Training
from muster.train.recollect import Recollection
from muster.train.replicas import Replicas
from muster.train.report import Report
from muster.train.trainee import Trainee


def resume(
    trainee: Trainee, plan: Training, world: World, report: Report, *, others_save: bool = False
) -> int:
    """Restore the newest sound state, in memory or in a checkpoint, if there is one; the number of steps done.

    What earlier saves have left half written is cleared away, unless `others_save` there already.
    """
    folder = shelf_of(plan)
    if world.is_first and not others_save:
        shelf.sweep(folder)
    shelved = shelf.steps(folder) if world.is_first else []
    memory = Recollection(plan, world, report)
    candidates = [(step, 0) for step in shelved]
    if world.is_first:  # of one step, that in memory comes first
        candidates = sorted(candidates + [(held.step, held.attempt) for held in memory.whole()])
    while True:
        # The first rank names a candidate, and each rank reads its share of the bytes.
        step, attempt = candidates.pop() if candidates else (-1, 0)
        number, attempt = map(int, world.sum(step + 1, attempt))
        if number == 0:
            break
        generation = Generation(attempt, number - 1) if attempt else None
        if generation is None:
            path = shelf.folder_of(folder, number - 1)
            content = _sound(path, world)
        else:
            path, content = memory.gather(generation, trainee)
        (bad,) = world.sum(content is None)
        if content is not None and not bad:
            where = f"{path}" if generation is None else "memory"
            done = _restore(trainee, plan, report, path, content, where)
            memory.settle(generation)
            return done
        if world.is_first and generation is None:
            report.note("checkpoint-damaged", _what_is_wrong(path))
    (count,) = map(int, world.sum(len(shelved)))
    if count:
        raise shelf.none_sound(folder, count)
    memory.settle(None)
    return 0


def _sound(path: Path, world: World) -> Manifest | None:
    """The manifest of a checkpoint, unless a byte of this rank's share of it is wrong."""
    try:
        content = manifest.read(path)
    except CheckpointError:
        return None
    bad = manifest.problems(path, content, part=world.rank, parts=world.size)
    return None if any(bad) else content


def _what_is_wrong(path: Path) -> str:
    try:
        manifest.verify(path)
    except CheckpointError as error:
        return str(error)
    return (
        f"{path} is sound on the first rank and not on another: look at the file system of the other machines"
    )


def _restore(
    trainee: Trainee, plan: Training, report: Report, path: Path, content: Manifest, where: str
) -> int:
    changed = differences(content.identity, identity(plan.run))
    if changed:
        raise CheckpointError(
            f"{path} belongs to another configuration ({'; '.join(changed[:3])}): change it back, or give this run "
            f"another name"
        )
    trainee.restore(path, content.step)
    trainee.guard.restore(content.guard)
    said = f"resumed from {where} at step {content.step} of {plan.steps}"
    report.note("resumed", said, step=content.step, source=where)
    return content.step


@dataclass(slots=True)
class _Flight:
    """A save that has begun and is not yet a checkpoint."""

    step: int
    begun: float
    stall_s: float
    held_out_loss: float | None
    guard: dict[str, Any]
    """What the guard knew then."""
    size_bytes: int = 0
    """Of all ranks, known when it is committed."""


class Saver:
    """Saves while training goes on: a thread of each rank copies its shards, and writes the copy.

    The copy is a late one, made during the passes of the next step. No thread talks to another rank. Whether a save
    is due, still being written or has failed goes along with the exchange that every step makes anyway (`votes`), so
    all ranks know at the same step (`after`); when all have written, the first rank's thread turns the files into a
    checkpoint. One save at a time: one that comes due meanwhile is put off. A save that fails on the way is told, and
    tried again at the next interval.
    """

    def __init__(self, trainee: Trainee, plan: Training, world: World, report: Report, *, step: int) -> None:
        """`step` is the one that training begins or resumes at."""
        self._trainee, self._plan, self._world, self._report = trainee, plan, world, report
        self._shelf, self._config = shelf_of(plan), plan.run.checkpoint
        self._pace = Pace(plan, world, report)
        self._work = Background()
        self._due = self._put_off = self._told = False
        self._writing: _Flight | None = None
        """What has begun, and as far as this rank has learnt is not yet written by all."""
        self._committing: _Flight | None = None
        """What all have written; on the first rank only."""
        self._committed = self._asked = step
        self._why = "a rank could not write its part"
        self._score: tuple[int, float] | None = None
        shelved = [earlier for earlier in shelf.steps(self._shelf) if earlier <= step]
        found = shelf.best(self._shelf, shelved) if world.is_first and self._config.keep_best else None
        (self._best,) = world.sum((found[1] if found else math.inf) if world.is_first else 0.0)
        self._late = self._stage()
        self.replicas = Replicas(trainee, plan, world, report, step=step)

    def votes(self, step: int) -> tuple[float, ...]:
        """This rank's part of the exchange after `step`: a save is due, is being written, has failed; and the same of
        the copies in memory."""
        if (
            self._world.is_first and step != self._asked and self._pace.rings(step)
        ):  # once, if a step is repeated
            self._due = True
        self._asked = step
        own = float(self._due), float(self._work.busy), float(self._work.failed)
        return *own, *self.replicas.votes(step)

    def scored(self, step: int, evaluation: Evaluation) -> None:
        """Take note of the evaluation of the state after `step`."""
        self._score = step, evaluation.loss

    def after(self, step: int, votes: Sequence[float]) -> None:
        """With the sums of all ranks' votes after `step`: finish what can be, and begin what is due."""
        self.replicas.after(step, votes[3:])
        due, busy, failed = votes[:3]
        if self._writing is not None and not busy:
            self._settle(bool(failed))
            busy = not failed  # on the first rank, of which the others hear in the next exchange
        self._hear()
        loss = self._loss_of(step)
        is_best = self._config.keep_best and loss is not None and loss < self._best
        if not (due or is_best):
            return
        if not busy:
            self._begin(step)
        elif not self._put_off:
            self._put_off = True
            self._report.event(
                "checkpoint-put-off", step=step, reason="the one before is still being written"
            )

    def finish(self, step: int) -> None:
        """Have `step` saved, waiting for it and for a save in flight; it is complete when this returns.

        DoesNotFit, on all ranks, where it cannot be written. All ranks must call.
        """
        self.drain()
        if self._is_saved(step):
            return
        self._begin(step)
        self.drain()
        if not self._is_saved(step):
            raise DoesNotFit(f"step {step}, at which this run stops, is not saved: {self._why}")

    def _is_saved(self, step: int) -> bool:
        (saved,) = self._world.sum(self._world.is_first and self._committed == step)
        return bool(saved)

    def drain(self) -> None:
        """Wait until nothing is in flight on any rank. All ranks must call."""
        self._trainee.beat.enter("save")
        self._work.wait()
        if self._writing is not None:
            (failures,) = self._world.sum(self._work.failed)
            if said := refusals(shelf.partial_of(self._shelf, self._writing.step)):
                self._why = said[0]
            self._world.barrier()  # all have read it
            self._settle(bool(failures))
        self._work.wait()
        self._hear()

    def _begin(self, step: int) -> None:
        """Start copying this rank's shards and writing them."""
        self._trainee.check_copies(step)  # so that no checkpoint holds what its copies contradict
        begun = time.perf_counter()
        self._trainee.beat.enter("save")
        self._due = self._put_off = False
        refusal: OSError | None = None
        if self._world.is_first:
            try:
                shelf.begin(self._shelf, step)
            except OSError as error:
                refusal = error
                self._tell(step, str(refused(self._state_bytes, self._shelf, error)))
        if any(self._world.sum(refusal is not None)):
            return
        partial, rank = shelf.partial_of(self._shelf, step), self._world.rank
        if self._late is not None:
            self._late.begin(step, lambda copy: write_file(copy.pieces(), self._state_bytes, partial, rank))
        else:
            state, whole = self._trainee.owned(), self._trainee.mesh.is_first_of_stage
            self._work.start(lambda: write_shards(state, partial, rank, owns_whole=whole), here=True)
        self._trainee.model.forget_residuals()
        loss = self._loss_of(step)
        self._best = min(self._best, math.inf if loss is None else loss)
        stall_s = time.perf_counter() - begun
        self._writing = _Flight(step, begun, stall_s, loss, self._trainee.guard.state())

    def _settle(self, failed: bool) -> None:
        """All ranks have written, or have failed to: the first rank makes a checkpoint of it, or clears it away."""
        flight, self._writing = self._writing, None
        assert flight is not None
        error = self._work.take()
        if not self._world.is_first:
            return
        if failed:
            said = refusals(shelf.partial_of(self._shelf, flight.step))
            shelf.abandon(self._shelf, flight.step)
            self._tell(flight.step, said[0] if said else str(error or self._why))
        else:
            self._committing = flight
            self._work.start(lambda: self._commit(flight))

    def _commit(self, flight: _Flight) -> None:
        """Runs in the background, on the first rank."""
        plan, step = self._plan, flight.step
        try:
            sums = collect_sums(shelf.partial_of(self._shelf, step), self._world.size)
            content = replace(
                describe(plan, step, sums), held_out_loss=flight.held_out_loss, guard=flight.guard
            )
            shelf.commit(self._shelf, step, content)
            flight.size_bytes = sum(entry.bytes for entry in content.files.values())
        except CheckpointError:
            shelf.abandon(self._shelf, step)
            raise
        except OSError as error:
            shelf.abandon(self._shelf, step)
            raise refused(self._state_bytes, self._shelf, error) from error
        self._committed = step
        keep, every = self._config.keep, self._config.keep_every
        shelf.retain(
            self._shelf,
            keep,
            saved=step,
            every=every.steps if every else None,
            keep_best=self._config.keep_best,
        )

    def _hear(self) -> None:
        """On the first rank: tell what became of a checkpoint that was being made, once that is over."""
        if self._committing is None or self._work.busy:
            return
        flight, self._committing = self._committing, None
        error = self._work.take()
        if self._committed != flight.step:
            self._tell(flight.step, str(error))
            return
        if error is not None:
            self._report.note("checkpoint-kept", f"an old checkpoint could not be deleted ({error})")
        self._told = False
        path = shelf.folder_of(self._shelf, flight.step)
        stall_s = flight.stall_s + (self._late.waited_s if self._late is not None else 0.0)
        seconds = time.perf_counter() - flight.begun
        self._report.event(
            "checkpoint",
            step=flight.step,
            path=str(path),
            bytes=flight.size_bytes,
            seconds=seconds,
            stall_s=stall_s,
        )
        self._pace.measured(stall_s, seconds)

    def _tell(self, step: int, why: str) -> None:
        """A save has failed: people are told once, until one succeeds again."""
        self._why = why
        sentence = f"step {step} is not saved, the checkpoints before it are untouched: {why}"
        if self._told:
            self._report.event("checkpoint-failed", message=sentence, step=step)
        else:
            self._report.note("checkpoint-failed", sentence, step=step)
        self._told = True

    def _loss_of(self, step: int) -> float | None:
        return self._score[1] if self._score is not None and self._score[0] == step else None

    def _stage(self) -> LateCopy | None:
        """Memory for the copies, or None where it is wanting: then saves are written straight from the state."""
        whole = self._trainee.mesh.is_first_of_stage
        self._state_bytes = arrange(self._trainee.owned(), owns_whole=whole).size_bytes
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self._plan.layout.offload == "disk":
            reason = "layout.offload: disk says that memory is wanting"
        elif self._state_bytes > free // 2:
            reason = (
                f"a copy of {size(self._state_bytes)} a rank would take more than half of the free memory"
            )
        else:
            return LateCopy(self._trainee, self._work, owns_whole=whole)
        self._report.note("checkpoint-foreground", f"training waits for its checkpoints: {reason}")
        return None


def leave(saver: Saver, plan: Training, step: int) -> NoReturn:
    """The last checkpoint of ranks that were asked to stop; does not return: Preempted, failed or not."""
    again = "run the same command again"
    try:
        saver.finish(step)
    except (OSError, MusterError) as error:
        raise Preempted(
            f"stopped at step {step} of {plan.steps}, but its checkpoint failed ({error}): {again} to resume from "
            f"the newest sound one"
        ) from error
    raise Preempted(f"stopped at step {step} of {plan.steps}, which is saved: {again} to go on")


def shelf_of(plan: Training) -> Path:
    return plan.folder / "checkpoints"
