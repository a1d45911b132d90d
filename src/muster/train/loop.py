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
from muster.resilience.beats import Beat
from muster.train import saves
from muster.train.clock import Alarm
from muster.train.evaluate import Evaluation
from muster.train.plan import Plan, Training
from muster.train.report import Report
from muster.train.trainee import Trainee


def train(plan: Plan, world: World, report: Report, beat: Beat | None = None) -> Evaluation | None:
    """Train to the end of the run, resuming where a sound checkpoint says; the last evaluation is returned."""
    trainee = Trainee(plan, world, beat)
    begun = step = saves.resume(trainee, plan, world, report)
    report.begin(step)
    sampler = Sampler(plan.corpus, plan.sequence, plan.run.train.seed)
    evaluation_due = Alarm(plan.run.train.eval_every if plan.corpus.held_out else None)
    checkpoint_due = Alarm(plan.run.checkpoint.every)
    last_evaluation = None
    saved = step
    gc.disable()  # a collection in the middle of one rank's step would make every other rank wait

    while step < plan.steps:
        trainee.beat.step(step + 1)
        batches = microbatches(sampler, plan, trainee.mesh.data_index, step)
        trainee.beat.enter("exchange")
        # One small exchange a step: the size of the global batch, and what the first rank's clock says is due.
        tokens, evaluate_now, save_now = world.sum(
            trainee.mesh.reads_first and sum(batch.valid_tokens for batch in batches),
            world.is_first and evaluation_due.rings(step + 1),
            world.is_first and checkpoint_due.rings(step + 1),
        )
        # The second step is like all that follow; in the first, much is done once.
        meter = Meter(trainee.mesh.groups) if step == begun + 1 and world.size > 1 else None
        update = trainee.update(step, batches, int(tokens), meter=meter)
        step += 1
        report.step(step, update)
        if meter is not None:
            report.traffic(meter.traffic)
        if evaluate_now and step < plan.steps:
            last_evaluation = trainee.evaluate(plan.corpus, limit_tokens=plan.run.train.eval_tokens)
            report.evaluation(step, last_evaluation)
        if save_now and step < plan.steps:
            saves.save(trainee, plan, world, report, step)
            saved = step
        if step % 100 == 0:
            gc.collect(1)

    if saved < step:
        saves.save(trainee, plan, world, report, step)
    if plan.corpus.held_out:
        last_evaluation = trainee.evaluate(plan.corpus)
        report.evaluation(step, last_evaluation)
    report.end(step)
    return last_evaluation


def microbatches(sampler: Sampler, plan: Plan, part: int, step: int) -> list[Batch]:
    """One data part of the global batch of a step, which is the same for any number of ranks."""
    return [sampler.batch(samples) for samples in microbatch_ranges(plan, part, step)]


def microbatch_ranges(training: Training, part: int, step: int) -> list[range]:
    """The numbers of the samples in each microbatch of one data part."""
    per_part = training.sequences_per_batch // training.layout.data
    first = step * training.sequences_per_batch + part * per_part
    size = training.layout.microbatch
    return [range(start, start + size) for start in range(first, first + per_part, size)]
