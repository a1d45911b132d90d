"""The two ends of `muster train`: the check before any rank is started, and what each rank then does."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch

from muster.checkpoint import shelf
from muster.checkpoint.keeper import Keeper
from muster.checkpoint.manifest import sum_file, write_synced
from muster.checkpoint.sealed import SEAL, seal, unseal
from muster.config import schema
from muster.config.digest import differences, digest, identity
from muster.data.progress import Progress
from muster.errors import UsageError
from muster.observe.format import count, size
from muster.observe.records import RunLog
from muster.observe.room import say
from muster.parallel.fit import fit, least
from muster.parallel.memory import estimate
from muster.parallel.world import join, usable_cores
from muster.resilience.agent import Job
from muster.resilience.between import GROUP, Between
from muster.resilience.coordinator import Fitted
from muster.resilience.lifeline import Lifeline
from muster.resilience.ranks import Place
from muster.resilience.watchdog import Watchdog
from muster.train import oom
from muster.train import plan as planning
from muster.train.dealing import one_group, refuse_divisions
from muster.train.group_rounds import MeetingGroups
from muster.train.groups import GroupTraining
from muster.train.loop import train
from muster.train.plan import Plan
from muster.train.report import Report
from muster.train.savings import sentence


def check(run: schema.Run, *, base: Path, folder: Path, progress: Progress | None = None) -> Plan:
    """Plan the run and claim its folder; everything that can be refused is refused here, before a rank starts."""
    _refuse_foreign(run, folder)
    plan = planning.make(run, base=base, folder=folder, gpus=torch.cuda.device_count(), progress=progress)
    if run.faults.elastic:
        refuse_divisions(plan)
    claim(plan)
    return plan


def claim(plan: Plan) -> None:
    """Make the run's folder: its resolved run file and its tokenizer."""
    run, folder = plan.run, plan.folder
    _refuse_foreign(run, folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan.corpus.tokenizer.save(folder / "tokenizer")
    content = {
        "run": run.to_dict(),
        "digest": digest(run),
        "identity": identity(run),
        "base": str(plan.base.resolve()),
        "steps": plan.steps,
        "files": {
            f"tokenizer/{path.name}": sum_file(path).sha256
            for path in sorted((folder / "tokenizer").iterdir())
        },
    }
    draft = folder / f"run.json.{secrets.token_hex(4)}.partial"  # agents of several nodes may write at once
    write_synced(draft, seal(json.loads(json.dumps(content))))
    draft.rename(folder / "run.json")


def _refuse_foreign(run: schema.Run, folder: Path) -> None:
    record = folder / "run.json"
    if not record.exists():
        return
    try:
        content = record.read_bytes()
        plain = json.loads(content)
        known = (unseal(content) if SEAL in plain else plain)["identity"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{record} is damaged ({error}): delete that file, and this command writes it again"
        ) from None
    changed = differences(known, identity(run))
    if changed:
        raise UsageError(
            f"{folder} belongs to a run with another configuration ({'; '.join(changed[:3])}): "
            f"give this run another name, or delete that folder"
        )


def describe(plan: Plan) -> list[str]:
    """What will be done and why, for the terminal."""
    spec, corpus, layout = plan.spec, plan.corpus, plan.layout
    sizes = f"{count(spec.parameters())} parameters, context {spec.context}, vocabulary {spec.vocab}"
    tokens = f"{count(corpus.train_tokens)} training tokens, {count(corpus.held_out_tokens)} held out"
    return [
        f"run     {plan.run.name} in {plan.folder}",
        f"model   {spec.family}, {sizes}",
        f"data    {tokens}; {corpus.report}",
        f"train   {plan.steps} steps of {plan.run.train.batch_tokens} tokens, {plan.run.train.precision}",
        f"layout  {layout} ({layout.reason})",
        f"memory  {_memory(plan)}",
        f"attend  {plan.attention}",
        *([] if plan.run.train.sync is None else [f"sync    {sentence(plan)}"]),
    ]


def _memory(plan: Plan) -> str:
    """What the rank that needs most will hold in tensors at its peak, by the formulas of `parallel/memory.py`."""
    train = plan.run.train
    needs = [
        estimate(
            plan.spec,
            plan.layout,
            sequence=plan.sequence,
            precision=train.precision,
            optimizer=train.optimizer.kind,
            device="cuda" if torch.cuda.is_available() else "cpu",
            pipeline_rank=rank,
            sync_copies=train.sync.copies if train.sync else 0,
        )
        for rank in range(plan.layout.pipeline)
    ]
    most = max(needs, key=lambda need: need.total_bytes)
    return (
        f"{size(most.total_bytes)} of tensors on a rank at its peak: parameters {size(most.parameters_bytes)}, "
        f"optimizer {size(most.optimizer_bytes)}, activations {size(most.activations_bytes)}, and buffers"
    )


def slots() -> int:
    """Ranks that this machine can hold beside other nodes."""
    return torch.cuda.device_count() or usable_cores()


def job(plan: Plan, argv: Sequence[str], *, alone: bool) -> Job:
    """What the agent needs to know to keep the ranks of a run going; they are `muster *argv`.

    `alone`: no further node takes part, so the layout is what it is.
    """
    run, layout = plan.run, plan.layout

    def fitting(ranks: int) -> Fitted | None:
        if alone:
            return Fitted(layout.world, {}, wanted=True)
        found = fit(run, plan.spec, ranks, cores=usable_cores(), gpus=torch.cuda.device_count())
        if found is None:
            return None
        auto = isinstance(run.layout, str)
        sizes = {} if auto else {"replicate": found.replicate, "shard": found.shard}
        return Fitted(found.world, sizes, wanted=not auto and found.world == layout.world)

    memory = None if run.checkpoint.memory == "none" else Keeper(digest(run))

    def committed() -> int:
        shelved = max(shelf.steps(plan.folder / "checkpoints"), default=0)
        return max(shelved, 0 if memory is None else memory.newest())

    return Job(
        argv=argv,
        folder=plan.folder,
        digest=digest(run),
        fit=fitting,
        needs=f"this layout needs {least(run.layout)} at least",
        committed=committed,
        restarts=run.faults.restarts,
        grace_s=run.faults.grace,
        watch=lambda place: watchdog(plan, place),
        memory=memory,
    )


def watchdog(plan: Plan, place: Place) -> Watchdog:
    """Of a set of ranks of a run, in whose events it notes what it sees."""
    of_stage = place.world // plan.layout.pipeline
    here = range(place.first, place.first + place.ranks)
    stages = [range(stage * of_stage, (stage + 1) * of_stage) for stage in range(plan.layout.pipeline)]

    def note(kind: str, sentence: str) -> None:
        log = RunLog(plan.folder)
        log.event(kind, message=sentence)
        log.close()
        say(sentence)

    def out_of_memory(rank: int, held_bytes: int) -> str:
        return oom.report(plan, rank=rank, on_gpu=False, total_bytes=held_bytes)

    return Watchdog(
        plan.folder,
        place.ranks,
        hang_after_s=plan.run.faults.hang_after,
        first=place.first,
        name=place.name,
        peers=[[rank for rank in ranks if rank in here] for ranks in stages],
        note=note,
        out_of_memory=out_of_memory,
    )


def run_rank(run: schema.Run, *, base: Path, folder: Path, lifeline: Lifeline | None = None) -> None:
    """Join the other ranks and train; without a lifeline nobody can ask this rank to stop."""
    if run.faults.elastic:
        _run_rank_of_group(run, base=base, folder=folder, lifeline=lifeline or Lifeline())
        return
    with join() as world:
        plan = planning.make(run, base=base, folder=folder, gpus=torch.cuda.device_count(), ranks=world.size)
        if world.is_first:
            claim(plan)  # nobody has, under `torchrun`
        with Report(plan, world) as report:
            train(plan, world, report, lifeline or Lifeline())


def _run_rank_of_group(run: schema.Run, *, base: Path, folder: Path, lifeline: Lifeline) -> None:
    """The same in one of the replica groups, each of which is a world of its own."""
    if GROUP not in os.environ:
        raise UsageError(
            "faults.elastic starts its groups of ranks itself: run `muster train`, without torchrun"
        )
    with join() as world:
        plan = planning.make(run, base=base, folder=folder, gpus=torch.cuda.device_count())
        kind = GroupTraining if run.train.sync is None else MeetingGroups
        with (
            contextlib.closing(Between.connect(world.rank, run.faults.timeouts, lifeline.beat)) as between,
            Report(plan, world, speaks=False) as report,
        ):
            kind(one_group(plan), world, report, between, lifeline).run()
