"""The two ends of `muster train`: the check before any rank is started, and what each rank then does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from muster.checkpoint.manifest import write_synced
from muster.config import schema
from muster.config.digest import differences, digest, identity
from muster.data.progress import Progress
from muster.errors import UsageError
from muster.observe.format import count, size
from muster.observe.records import RunLog
from muster.parallel.memory import estimate
from muster.parallel.world import join
from muster.resilience.beats import Beat
from muster.resilience.watchdog import Watchdog
from muster.train import oom
from muster.train import plan as planning
from muster.train.loop import train
from muster.train.plan import Plan
from muster.train.report import Report


def check(run: schema.Run, *, base: Path, folder: Path, progress: Progress | None = None) -> Plan:
    """Plan the run and claim its folder; everything that can be refused is refused here, before a rank starts."""
    _refuse_foreign(run, folder)
    plan = planning.make(run, base=base, folder=folder, gpus=torch.cuda.device_count(), progress=progress)
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
    }
    draft = folder / "run.json.partial"
    write_synced(draft, json.dumps(content, indent=1).encode())
    draft.rename(folder / "run.json")


def _refuse_foreign(run: schema.Run, folder: Path) -> None:
    record = folder / "run.json"
    if not record.exists():
        return
    changed = differences(json.loads(record.read_bytes())["identity"], identity(run))
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
        )
        for rank in range(plan.layout.pipeline)
    ]
    most = max(needs, key=lambda need: need.total_bytes)
    return (
        f"{size(most.total_bytes)} of tensors on a rank at its peak: parameters {size(most.parameters_bytes)}, "
        f"optimizer {size(most.optimizer_bytes)}, activations {size(most.activations_bytes)}, and buffers"
    )


def watchdog(plan: Plan) -> Watchdog:
    """The agent's, which notes in the run's events what it sees."""
    layout = plan.layout
    of_stage = layout.world // layout.pipeline
    log = RunLog(plan.folder)

    def note(kind: str, sentence: str) -> None:
        log.event(kind, message=sentence)
        sys.stdout.write(sentence + "\n")
        sys.stdout.flush()

    def out_of_memory(rank: int, held_bytes: int) -> str:
        return oom.report(plan, rank=rank, on_gpu=False, total_bytes=held_bytes)

    return Watchdog(
        plan.folder,
        layout.world,
        hang_after_s=plan.run.faults.hang_after,
        peers=[range(stage * of_stage, (stage + 1) * of_stage) for stage in range(layout.pipeline)],
        note=note,
        out_of_memory=out_of_memory,
    )


def run_rank(run: schema.Run, *, base: Path, folder: Path, beat: Beat | None = None) -> None:
    """Join the other ranks and train."""
    with join() as world:
        plan = planning.make(run, base=base, folder=folder, gpus=torch.cuda.device_count(), ranks=world.size)
        if world.is_first:
            claim(plan)  # nobody has, under `torchrun`
        with Report(plan, world) as report:
            train(plan, world, report, beat)
