"""The training loop of one replica group among others that may die and come back.

Differs from `loop.py` in this: a step counts when the groups have agreed on it (`resilience/between.py`), and is done
again when they have not; one group, which leads, reads and writes the checkpoints and reports; and at each new view,
groups that have come back take the state from one that has it. What comes next follows from sums over all
groups, and is part of that state, so they all do the same.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any, NoReturn

import torch
from torch import Tensor

from muster.checkpoint import shelf
from muster.comm.averager import Averager
from muster.data.sampler import Sampler
from muster.errors import Preempted
from muster.parallel.world import World
from muster.resilience.between import Aborted, Between
from muster.resilience.guard import BadStep
from muster.resilience.lifeline import Lifeline
from muster.train import gradients, origin, recovery, saves
from muster.train.clock import Alarm
from muster.train.dealing import sample_ranges, turns_of
from muster.train.evaluate import BrokenOff, Evaluation
from muster.train.plan import Plan
from muster.train.report import Report
from muster.train.trainee import Trainee, Update

Compute = Callable[[], tuple[list[Tensor], Any]]
"""This group's part of a sum, and its note for the ledger; computed anew for each division of the work."""


class Next(IntEnum):
    """What all groups do next."""

    STEP = 0
    EVALUATE = 1
    REWIND = 2
    END = 3
    LEAVE = 4


class GroupTraining:
    def __init__(
        self,
        plan: Plan,
        world: World,
        report: Report,
        between: Between,
        lifeline: Lifeline,
        *,
        averager: Averager | None = None,
    ) -> None:
        """`plan` is that of one group (`dealing.one_group`); `averager` that of groups that train apart."""
        self.plan, self.world, self.report, self.between = plan, world, report, between
        self.lifeline, self.trainee = lifeline, Trainee(plan, world, lifeline.beat, averager)
        self.step, self.next = 0, Next.STEP
        self._sampler = Sampler(plan.corpus, plan.sequence, plan.run.train.seed)
        self._evaluation_due = Alarm(plan.run.train.eval_every if plan.corpus.held_out else None)
        self._evaluation: Evaluation | None = None
        self._bad: BadStep | None = None
        self._saver: saves.Saver | None = None
        """Of the group that leads."""
        self._epoch = 0

    def run(self) -> Evaluation | None:
        """Train to the end of the run; the last evaluation is returned.

        Preempted, after a checkpoint, when a rank of any group is asked to stop.
        """
        self.between.enter(self._load)
        gc.disable()  # a collection in the middle of one rank's step would make every other rank wait
        while True:
            self._meet()
            if self.next is Next.STEP:
                self._take_step()
            elif self.next is Next.EVALUATE:
                self._evaluate()
            elif self.next is Next.REWIND:
                self._rewind()
            elif self.next is Next.LEAVE:
                self._leave()
            else:
                break
        self._agree(self._conclude, last=True)
        self.report.end(self.step)
        return self._evaluation

    def _load(self) -> None:
        """This group reads the checkpoint, and all others take the state from it."""
        self.report.speak(True)
        self.step = saves.resume(self.trainee, self.plan, self.world, self.report)
        if self.step == 0:
            origin.begin(self.trainee, self.plan, self.world, self.report)
        recovery.recall(self.trainee.guard, self.plan.folder, self.world)
        if self.step == self.plan.steps:
            self.next = self._after_the_last()
        self.report.begin(self.step)

    def _after_the_last(self) -> Next:
        return Next.EVALUATE if self.plan.corpus.held_out else Next.END

    def _take_step(self) -> None:
        step, train, trainee = self.step, self.plan.run.train, self.trainee
        evaluates = self._evaluation_due.rings(step + 1)
        named = [*trainee.model.named_parameters(), *trainee.model.copies()]
        load: Tensor | None = None

        def compute() -> tuple[list[Tensor], Any]:
            nonlocal load
            trainee.beat.step(step + 1)
            gradients.forget(named)
            ranges = self._samples(step)
            batches = [self._sampler.batch(samples) for samples in ranges]
            reads = trainee.mesh.reads_first
            saver = self._saver
            trainee.beat.enter("exchange")
            tokens, evaluate, stop, *save_votes = self.world.sum(
                reads and sum(batch.valid_tokens for batch in batches),
                self.world.is_first and self.between.leads and evaluates,
                self.lifeline.asked,
                *(saver.votes(step) if saver else ()),
            )
            if saver is not None and not stop:
                saver.after(step, save_votes)
            # As if every token were valid; how many are is known with the sum.
            summed = trainee.accumulate(step, batches, 1 / train.batch_tokens)
            load = trainee.model.take_load()
            small = torch.tensor([summed, tokens, evaluate, stop], dtype=torch.float64)
            counts = [] if load is None else [load]
            note = {"step": step + 1, "samples": spans(ranges) if reads else []}
            return [small, *counts, *gradients.shards(named)], note

        small, *_ = self._agree(compute)
        summed, tokens, evaluate, stop = small.tolist()
        gradients.scale(named, train.batch_tokens / tokens)
        trainee.model.average_tied()
        try:
            update = trainee.apply(step, summed, int(tokens), load)
        except BadStep as bad:
            self._recover(bad)
        else:
            self._took(update, evaluates=bool(evaluate))
        if stop:
            self.next = Next.LEAVE

    def _took(self, update: Update, *, evaluates: bool = False) -> None:
        """What follows a step that was applied."""
        self.step += 1
        self.lifeline.reached(self.step)
        self.report.step(self.step, update)
        if self.trainee.guard.checks_copies(self.step):
            self.trainee.check_copies(self.step)
        if self.step == self.plan.steps:
            self.next = self._after_the_last()
        elif evaluates:
            self.next = Next.EVALUATE
        if self.step % 100 == 0:
            gc.collect(1)

    def _recover(self, bad: BadStep) -> None:
        """All groups have refused the same step, because they judge the same sums."""
        guard = self.trainee.guard
        if recovery.action(bad, self.step, guard) == "rewind":
            self._bad, self.next = bad, Next.REWIND
        else:
            recovery.withdraw(bad, self.step, self.step, guard, self.report)

    def _rewind(self) -> None:
        """Every group reads the newest checkpoint, once the group that leads has none under way."""
        step, trainee = self.step, self.trainee
        self._agree(self._drained)
        found = saves.resume(trainee, self.plan, self.world, self.report, others_save=not self.between.leads)
        self.step = found or step  # no checkpoint yet: only skipped
        # A group that came since has not seen the step, but leads only when all that have are gone.
        bad = self._bad or BadStep(f"step {step + 1} and the one before were bad", "nan")
        recovery.withdraw(bad, step, self.step, trainee.guard, self.report)
        self._bad, self.next = None, Next.STEP

    def _evaluate(self) -> None:
        """Each group scores its share."""
        read = 0

        def compute() -> tuple[list[Tensor], Any]:
            nonlocal read
            limit = None if self.step == self.plan.steps else self.plan.run.train.eval_tokens
            share = self.between.position, len(self.between.members)
            try:
                own = self.trainee.evaluate(
                    self.plan.corpus, limit, share=share, asked=lambda: self.lifeline.asked
                )
            except BrokenOff:
                return [torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)], None
            read = own.bytes
            return [torch.tensor([own.nats, own.tokens, 0.0], dtype=torch.float64)], None

        (figures,) = self._agree(compute)
        nats, tokens, stop = figures.tolist()
        if stop:
            self.next = Next.LEAVE
            return
        self.next = Next.END if self.step == self.plan.steps else Next.STEP
        self._evaluation = Evaluation(nats=nats, tokens=int(tokens), bytes=read)
        self.report.evaluation(self.step, self._evaluation)
        if self._saver is not None:
            self._saver.scored(self.step, self._evaluation)

    def _drained(self) -> tuple[list[Tensor], Any]:
        if self._saver is not None:
            self._saver.drain()
        return [torch.zeros(1)], None

    def _conclude(self) -> tuple[list[Tensor], Any]:
        """What is left to do at the end, by whoever leads then."""
        if self._saver is not None:
            self._saver.finish(self.step)
        return [torch.zeros(1)], None  # for which the others wait

    def _leave(self) -> NoReturn:
        """The last checkpoint of groups that were asked to stop, by whoever leads then."""
        said = Preempted(
            f"stopped at step {self.step} of {self.plan.steps}: run the same command again to go on"
        )

        def compute() -> tuple[list[Tensor], Any]:
            nonlocal said
            try:
                if self._saver is not None:
                    saves.leave(self._saver, self.plan, self.step)
            except Preempted as end:
                said = end
            return [torch.zeros(1)], None

        self._agree(compute, last=True)
        raise said

    def _agree(self, compute: Compute, *, last: bool = False) -> list[Tensor]:
        """Compute and sum over the groups until the sum counts."""
        while True:
            tensors, note = compute()
            try:
                self.between.sum(tensors, note=note, last=last)
            except Aborted:
                self._meet()
                continue
            return tensors

    def _meet(self) -> None:
        """In a new view, bring those that have just come to where this group is, and know who leads."""
        between = self.between
        if between.epoch == self._epoch:
            return
        state = self.trainee.shards()
        if between.source is not None:
            self._take_over(state)
        self._epoch = between.epoch
        guard = _as_tensor(self.trainee.guard.everything())
        place = torch.tensor([self.step, self.next, len(guard)])
        for newcomer in between.newcomers:
            if between.send(newcomer, [place]):
                between.send(newcomer, [guard, *state])
        self.report.speak(between.leads, len(between.members))
        if between.leads and self._saver is None:
            if self.world.is_first:
                shelf.sweep(saves.shelf_of(self.plan))  # what the one before may have left half written
            self._saver = saves.Saver(self.trainee, self.plan, self.world, self.report, step=self.step)

    def _take_over(self, state: list[Tensor]) -> None:
        """Take the state from the group that the view names, or from the next one if that dies meanwhile."""
        place = torch.zeros(3, dtype=torch.int64)
        while True:
            arrived = self.between.receive([place])
            guard = torch.zeros(int(place[2]), dtype=torch.uint8)
            arrived = arrived and self.between.receive([guard, *state])
            if self.world.sum(arrived)[0] == self.world.size:
                break
            self.between.decline()
        self.between.confirm()
        self.step, self.next = int(place[0]), Next(int(place[1]))
        self.trainee.guard.restore(json.loads(guard.numpy().tobytes()))
        self.trainee.sync.loaded(self.step)
        self.trainee.optimizer.set_steps(self.step)

    def _samples(self, step: int) -> list[range]:
        layout, batch = self.plan.layout, self.trainee.guard.batch_of(step)
        turns = turns_of(layout.accumulate, len(self.between.members), self.between.position)
        return list(sample_ranges(self.plan, batch, self.trainee.mesh.data_index, turns))


def spans(ranges: Iterable[range]) -> list[list[int]]:
    return [[samples.start, samples.stop] for samples in ranges]


def _as_tensor(plain: dict[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)
