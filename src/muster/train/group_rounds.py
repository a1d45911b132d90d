"""Replica groups that train apart and meet every so many steps (`train.sync`), of which any may die and come back.

Between two meetings a group exchanges nothing with the others, and does not notice if they die; at a meeting the mean
is that over the groups that are alive (`rounds.py` may be asked again where the first answer did not count). What a
group had learnt since the last meeting dies with it, and its samples of that round are not dealt again. One that comes
back starts from the anchor and the outer momentum, with the inner moments of the group that it has them from. A
bad step ends the group that took it, and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from muster.parallel.world import World
from muster.resilience.between import Aborted, Between
from muster.resilience.lifeline import Lifeline
from muster.train.groups import GroupTraining, Next, spans
from muster.train.plan import Plan
from muster.train.report import Report


class GroupsAverager:
    """Means over the groups that are alive; the future holds `Aborted` where that does not count."""

    def __init__(self, between: Between) -> None:
        self._between = between
        self.figures: list[float] = []
        """Numbers to sum along with the next mean; afterwards their sums."""
        self.note: Any = None

    def start(self, messages: Sequence[Tensor]) -> Future[list[Tensor]]:
        result: Future[list[Tensor]] = Future()
        figures = torch.tensor([1.0, *self.figures], dtype=torch.float64)
        sums = [message.clone() for message in messages]
        try:
            self._between.sum([figures, *sums], note=self.note)
        except Aborted as aborted:
            result.set_exception(aborted)
            return result
        groups, *self.figures = figures.tolist()
        result.set_result([total.div_(groups) for total in sums])
        return result


class MeetingGroups(GroupTraining):
    """The loop of one of them."""

    def __init__(
        self, plan: Plan, world: World, report: Report, between: Between, lifeline: Lifeline
    ) -> None:
        self._averager = GroupsAverager(between)
        super().__init__(plan, world, report, between, lifeline, averager=self._averager)
        self._dealt: list[list[int]] = []
        """Samples since the last meeting."""
        self._evaluates = False

    def _take_step(self) -> None:
        step, trainee, world = self.step, self.trainee, self.world
        trainee.beat.step(step + 1)
        self._evaluates |= self._evaluation_due.rings(step + 1)
        ranges = self._samples(step)
        batches = [self._sampler.batch(samples) for samples in ranges]
        reads = trainee.mesh.reads_first
        trainee.beat.enter("exchange")
        saver = self._saver
        tokens, *save_votes = world.sum(
            reads and sum(batch.valid_tokens for batch in batches), *(saver.votes(step) if saver else ())
        )
        if saver is not None and self._has_met(step):
            saver.after(step, save_votes)
        update = trainee.update(step, batches, int(tokens))
        update = replace(
            update, tokens=update.tokens * len(self.between.members)
        )  # as many in each, but for a few
        self._dealt += spans(ranges) if reads else []
        if not self._has_met(step + 1):
            self._took(trainee.sync.after_step(step + 1, update))
            return
        evaluates, asked = world.sum(
            world.is_first and self.between.leads and self._evaluates, self.lifeline.asked
        )
        while True:
            self._averager.figures = [evaluates, asked]
            self._averager.note = {"step": step + 1, "samples": self._dealt}
            try:
                update = trainee.sync.after_step(step + 1, update)
            except Aborted:
                self._meet()
                continue
            break
        evaluates, asked = self._averager.figures
        self._dealt, self._evaluates = [], False
        self._took(update, evaluates=bool(evaluates))
        if asked:
            self.next = Next.LEAVE

    def _has_met(self, step: int) -> bool:
        sync = self.plan.run.train.sync
        assert sync is not None
        return step % sync.interval == 0 or step == self.plan.steps
