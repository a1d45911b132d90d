"""The training loop, as a story on one page. Run it with `muster train run.yaml`.

Knows nothing of how the model is spread over ranks (`parallel/`), what a checkpoint looks
like (`checkpoint/`) or where the tokens come from (`data/`).
"""

from __future__ import annotations

import gc

from muster.comm.meter import Meter
from muster.data.packing import Batch
from muster.data.sampler import Sampler
from muster.parallel.world import World
from muster.resilience.guard import BadStep
from muster.resilience.lifeline import Lifeline
from muster.train import origin, recovery, saves
from muster.train.clock import Alarm
from muster.train.evaluate import BrokenOff, Evaluation
from muster.train.plan import Plan, Training
from muster.train.report import Report
from muster.train.trainee import Trainee


def train(plan: Plan, world: World, report: Report, lifeline: Lifeline) -> Evaluation | None:
    """Train to the end of the run, resuming where a sound checkpoint says; the last evaluation is returned.

    Preempted, after a checkpoint, when a rank is asked to stop.
    """
    trainee = Trainee(plan, world, lifeline.beat)
    begun = step = saves.resume(trainee, plan, world, report)
    if step == 0:
        origin.begin(trainee, plan, world, report)
    recovery.recall(trainee.guard, plan.folder, world)
    saver = saves.Saver(trainee, plan, world, report, step=step)
    report.begin(step)
    sampler = Sampler(plan.corpus, plan.sequence, plan.run.train.seed)
    evaluation_due = Alarm(plan.run.train.eval_every if plan.corpus.held_out else None)
    last_evaluation = None
    gc.disable()  # a collection in the middle of one rank's step would make every other rank wait

    while step < plan.steps:
        trainee.beat.step(step + 1)
        batches = microbatches(sampler, plan, trainee.mesh.data_index, trainee.guard.batch_of(step))
        trainee.beat.enter("exchange")
        # One small exchange a step: the size of the batch, what the first rank's clock says is due, whether any
        # rank was asked to stop, and how saving goes.
        tokens, evaluate_now, stop_now, *save_votes = trainee.sync.agree(
            step,
            trainee.mesh.reads_first and sum(batch.valid_tokens for batch in batches),
            [world.is_first and evaluation_due.rings(step + 1), lifeline.asked],
            saver.votes(step),
        )
        if (
            save_votes and not stop_now
        ):  # else the save after this step is the one that counts, and time is short
            saver.after(step, save_votes)
        # The second step is like all that follow; in the first, much is done once.
        meter = Meter(trainee.mesh.groups) if step == begun + 1 and world.size > 1 else None
        try:
            update = trainee.update(step, batches, int(tokens), meter=meter)
        except BadStep as bad:
            step = recovery.recover(bad, step, trainee, saver, plan, world, report)
            continue
        step += 1
        lifeline.reached(step)
        report.step(step, trainee.sync.after_step(step, update))
        if meter is not None:
            report.traffic(meter.traffic)
        if stop_now:
            saves.leave(saver, plan, step)
        if evaluate_now and step < plan.steps:
            last_evaluation = evaluated(trainee, plan, saver, step, lifeline, plan.run.train.eval_tokens)
            report.evaluation(step, last_evaluation)
            saver.scored(step, last_evaluation)
        if trainee.guard.checks_copies(step):
            trainee.check_copies(step)
        if step % 100 == 0:
            gc.collect(1)

    saver.finish(step)
    if plan.corpus.held_out:
        last_evaluation = evaluated(trainee, plan, saver, step, lifeline)
        report.evaluation(step, last_evaluation)
    report.end(step)
    return last_evaluation


def evaluated(
    trainee: Trainee,
    plan: Plan,
    saver: saves.Saver,
    step: int,
    lifeline: Lifeline,
    limit_tokens: int | None = None,
) -> Evaluation:
    """Score the state after `step`. Preempted, after a checkpoint, when a rank is asked to stop meanwhile."""
    try:
        return trainee.evaluate(plan.corpus, limit_tokens, asked=lambda: lifeline.asked)
    except BrokenOff:
        saves.leave(saver, plan, step)


def microbatches(sampler: Sampler, plan: Plan, part: int, batch: int) -> list[Batch]:
    """One data part of a global batch, given by its number; it is the same for any number of ranks."""
    return [sampler.batch(samples) for samples in microbatch_ranges(plan, part, batch)]


def microbatch_ranges(training: Training, part: int, batch: int) -> list[range]:
    """The numbers of the samples in each microbatch of one data part."""
    per_part = training.sequences_per_batch // training.layout.data
    first = batch * training.sequences_per_batch + part * per_part
    size = training.layout.microbatch
    return [range(start, start + size) for start in range(first, first + per_part, size)]
