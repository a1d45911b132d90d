"""The training loop of one replica group among others that may die and come back.

Differs from `loop.py` in this: a step counts when the groups have agreed on it (`resilience/between.py`), and is done
again when they have not; one group, which leads, reads and writes the checkpoints and reports; and at each new view,
groups that have come back take the state from one that has it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from muster.checkpoint import shelf
from muster.data.sampler import Sampler
from muster.parallel.world import World
from muster.resilience.between import Aborted, Between
from muster.train import gradients, origin, saves
from muster.train.clock import Alarm
from muster.train.dealing import sample_ranges, turns_of
from muster.train.evaluate import Evaluation
from muster.train.plan import Plan
from muster.train.report import Report
from muster.train.trainee import Trainee, Update

Compute = Callable[[], tuple[list[Tensor], Any]]
"""This group's part of a sum, and its note for the ledger; computed anew for each division of the work."""


class GroupTraining:
    def __init__(self, plan: Plan, world: World, report: Report, between: Between) -> None:
        """`plan` is that of one group (`dealing.one_group`)."""
        self.plan, self.world, self.report, self.between = plan, world, report, between
        self.trainee = Trainee(plan, world)
        self.step = 0
        self._evaluate_now = False
        self._sampler = Sampler(plan.corpus, plan.sequence, plan.run.train.seed)
        self._evaluation_due = Alarm(plan.run.train.eval_every if plan.corpus.held_out else None)
        self._saver: saves.Saver | None = None
        """Of the group that leads."""
        self._epoch = 0

    def run(self) -> Evaluation | None:
        """Train to the end of the run; the last evaluation is returned."""
        evaluation = None
        self.between.enter(self._load)
        self._meet()
        gc.disable()  # a collection in the middle of one rank's step would make every other rank wait
        while True:
            if self._evaluate_now:
                evaluation = self._evaluate()
                self.report.evaluation(self.step, evaluation)
                if self._saver is not None:
                    self._saver.scored(self.step, evaluation)
                self._meet()
            if self.step == self.plan.steps:
                break
            self.report.step(self.step + 1, self._update())
            self._meet()
            if self.step % 100 == 0:
                gc.collect(1)
        self._agree(self._conclude, last=True)
        self.report.end(self.step)
        return evaluation

    def _load(self) -> None:
        """This group reads the checkpoint, and all others take the state from it."""
        self.report.speak(True)
        self.step = saves.resume(self.trainee, self.plan, self.world, self.report)
        if self.step == 0:
            origin.begin(self.trainee, self.plan, self.world, self.report)
        self._evaluate_now = self.step == self.plan.steps and bool(self.plan.corpus.held_out)
        self.report.begin(self.step)

    def _update(self) -> Update:
        step, train, trainee = self.step, self.plan.run.train, self.trainee
        evaluates = self._evaluation_due.rings(step + 1)
        named = [*trainee.model.named_parameters(), *trainee.model.copies()]
        load: Tensor | None = None

        def compute() -> tuple[list[Tensor], Any]:
            nonlocal load
            gradients.forget(named)
            ranges = self._samples(step)
            batches = [self._sampler.batch(samples) for samples in ranges]
            reads = trainee.mesh.reads_first
            saver = self._saver
            tokens, evaluate, *save_votes = self.world.sum(
                reads and sum(batch.valid_tokens for batch in batches),
                self.world.is_first and self.between.leads and evaluates,
                *(saver.votes(step) if saver else ()),
            )
            if saver is not None:
                saver.after(step, save_votes)
            # As if every token were valid; how many are is known with the sum.
            summed = trainee.accumulate(step, batches, 1 / train.batch_tokens)
            load = trainee.model.take_load()
            small = torch.tensor([summed, tokens, evaluate], dtype=torch.float64)
            counts = [] if load is None else [load]
            note = {"step": step + 1, "samples": _spans(ranges) if reads else []}
            return [small, *counts, *gradients.shards(named)], note

        small, *_ = self._agree(compute)
        summed, tokens, evaluate = small.tolist()
        gradients.scale(named, train.batch_tokens / tokens)
        trainee.model.average_tied()
        update = trainee.apply(step, summed, int(tokens), load)
        self.step, ends = step + 1, step + 1 == self.plan.steps
        self._evaluate_now = bool(self.plan.corpus.held_out) if ends else bool(evaluate)
        return update

    def _evaluate(self) -> Evaluation:
        """Each group scores its share."""
        read = 0

        def compute() -> tuple[list[Tensor], Any]:
            nonlocal read
            limit = None if self.step == self.plan.steps else self.plan.run.train.eval_tokens
            share = self.between.position, len(self.between.members)
            own = self.trainee.evaluate(self.plan.corpus, limit, share=share)
            read = own.bytes
            return [torch.tensor([own.nats, own.tokens], dtype=torch.float64)], None

        (figures,) = self._agree(compute)
        self._evaluate_now = False
        nats, tokens = figures.tolist()
        return Evaluation(nats=nats, tokens=int(tokens), bytes=read)

    def _conclude(self) -> tuple[list[Tensor], Any]:
        """What is left to do at the end, by whoever leads then."""
        if self._saver is not None:
            self._saver.finish(self.step)
        return [torch.zeros(1)], None  # for which the others wait

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
        """In a new view, bring those that have just come to this step, and know who leads."""
        between = self.between
        if between.epoch == self._epoch:
            return
        state = self.trainee.shards()
        if between.source is not None:
            self._take_over(state)
        self._epoch = between.epoch
        place = torch.tensor([self.step, self._evaluate_now], dtype=torch.float64)
        for newcomer in between.newcomers:
            between.send(newcomer, [place, *state])
        self.report.speak(between.leads, len(between.members))
        if between.leads and self._saver is None:
            if self.world.is_first:
                shelf.sweep(saves.shelf_of(self.plan))  # what the one before may have left half written
            self._saver = saves.Saver(self.trainee, self.plan, self.world, self.report, step=self.step)

    def _take_over(self, state: list[Tensor]) -> None:
        """Take the state from the group that the view names, or from the next one if that dies meanwhile."""
        place = torch.zeros(2, dtype=torch.float64)
        while True:
            arrived = self.between.receive([place, *state])
            if self.world.sum(arrived)[0] == self.world.size:
                break
            self.between.decline()
        self.between.confirm()
        self.step, self._evaluate_now = int(place[0]), bool(place[1])
        self.trainee.optimizer.set_steps(self.step)

    def _samples(self, step: int) -> list[range]:
        layout = self.plan.layout
        turns = turns_of(layout.accumulate, len(self.between.members), self.between.position)
        return list(sample_ranges(self.plan, step, self.trainee.mesh.data_index, turns))


def _spans(ranges: Iterable[range]) -> list[list[int]]:
    return [[samples.start, samples.stop] for samples in ranges]
