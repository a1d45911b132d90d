"""A run's checkpoints during training: resume from the newest sound one, save, retain."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch

import muster
from muster.checkpoint import manifest, shelf
from muster.checkpoint.manifest import Manifest
from muster.checkpoint.state import collect_sums, write_shards
from muster.config.digest import differences, digest, identity
from muster.errors import CheckpointError
from muster.parallel.world import World
from muster.train.plan import Plan
from muster.train.report import Report
from muster.train.trainee import Trainee


def resume(trainee: Trainee, plan: Plan, world: World, report: Report) -> int:
    """Restore the newest sound checkpoint, if there is one, and return the number of steps done."""
    folder = shelf_of(plan)
    step = 0
    if world.is_first:  # checks every byte, once; the others take its word
        shelf.sweep(folder)
        found = shelf.newest_sound(folder, on_damaged=lambda what: report.note("checkpoint-damaged", what))
        step = 0 if found is None else found[1].step
    step = int(world.sum(step)[0])
    if step == 0:
        return 0
    path = shelf.folder_of(folder, step)
    content = manifest.read(path)
    changed = differences(content.identity, identity(plan.run))
    if changed:
        raise CheckpointError(
            f"{path} belongs to another configuration ({'; '.join(changed[:3])}): change it back, or give this run "
            f"another name"
        )
    trainee.restore(path, step)
    report.note("resumed", f"resumed from {path} at step {step} of {plan.steps}", step=step)
    return step


def save(trainee: Trainee, plan: Plan, world: World, report: Report, step: int) -> None:
    """Write a checkpoint after `step` updates; it is complete when this returns on the first rank."""
    started = time.perf_counter()
    trainee.beat.enter("save")
    folder = shelf_of(plan)
    partial = shelf.partial_of(folder, step)
    if world.is_first:
        partial.mkdir(parents=True)
    world.barrier()
    state = trainee.state() if trainee.mesh.is_first_copy else {}
    write_shards(state, partial, world.rank, owns_whole=trainee.mesh.is_first_of_stage)
    trainee.model.forget_residuals()
    world.barrier()
    if not world.is_first:
        return
    content = Manifest(
        format=manifest.FORMAT,
        step=step,
        tokens=step * plan.run.train.batch_tokens,
        seed=plan.run.train.seed,
        digest=digest(plan.run),
        identity=identity(plan.run),
        layout=asdict(plan.layout),
        model=asdict(plan.spec),
        versions={
            "muster": muster.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        files=collect_sums(partial, world.size),
    )
    path = shelf.commit(folder, step, content)
    shelf.retain(folder, plan.run.checkpoint.keep)
    size = sum(file.bytes for file in content.files.values())
    report.event("checkpoint", step=step, path=str(path), bytes=size, seconds=time.perf_counter() - started)


def shelf_of(plan: Plan) -> Path:
    return plan.folder / "checkpoints"
