"""What becomes of a run after a bad step: the batch is withdrawn, or the run goes back to a checkpoint, or it stops.

The record of withdrawn batches is `events.jsonl`, which outlives a kill at any moment, and the manifest
of each later checkpoint. A run that is resumed leaves out the same batches.
"""

from __future__ import annotations

from pathlib import Path

from muster.observe.records import EVENTS, read_jsonl
from muster.parallel.world import World
from muster.resilience.guard import Action, BadStep, Guard, Span
from muster.train import saves
from muster.train.plan import Plan
from muster.train.report import Report
from muster.train.trainee import Trainee

_WITHDRAWN = "batches-withdrawn"


def recover(
    bad: BadStep, step: int, trainee: Trainee, saver: saves.Saver, plan: Plan, world: World, report: Report
) -> int:
    """Go on after a bad step as `faults` in the run file says; all ranks call it, with `step` updates done.

    Returns the number of updates done afterwards. Raises `bad` where the run is to stop.

    Rewinding withdraws all batches since the checkpoint, as was done for PaLM's spikes (Chowdhery et al.
    2022): the same batches would lead the same parameters to the same place.
    """
    if plan.run.train.sync is not None:
        raise bad  # copies that train apart do not all come here, and what is under way knows of the step
    back = step
    if action(bad, step, trainee.guard) == "rewind":
        saver.drain()
        saver.replicas.drain()
        back = saves.resume(trainee, plan, world, report) or step  # no checkpoint yet: only skipped
    withdraw(bad, step, back, trainee.guard, report)
    return back


def action(bad: BadStep, step: int, guard: Guard) -> Action:
    """What is to be done about a bad step after `step` good ones. Raises `bad` where the run is to stop."""
    found = guard.act(step, bad.kind)
    if found == "stop":
        raise bad
    return found


def withdraw(bad: BadStep, step: int, back: int, guard: Guard, report: Report) -> None:
    """Never use the batch of a bad step again, nor those since step `back`, from where the run goes on."""
    batch, first = guard.batch_of(step), guard.batch_of(back)
    guard.withdraw(first, batch)
    what = f"batch {batch} is" if first == batch else f"batches {first} to {batch} are"
    report.note(
        _WITHDRAWN, f"{bad}: {what} not used again, the run goes on from step {back}",
        step=step, fault=bad.kind, first=first, last=batch, back_to=back,
    )  # fmt: skip


def recall(guard: Guard, folder: Path, world: World) -> None:
    """Withdraw what the run's events say was withdrawn, before a checkpoint could tell of it; all ranks call it."""
    spans = _withdrawn(folder) if world.is_first else []
    (number,) = world.sum(len(spans))
    if not number:
        return
    flat = [float(batch) for span in spans for batch in span] or [0.0] * (2 * int(number))
    told = [int(batch) for batch in world.sum(*flat)]
    for first, last in zip(told[::2], told[1::2], strict=True):
        guard.withdraw(first, last)


def _withdrawn(folder: Path) -> list[Span]:
    events = read_jsonl(folder / EVENTS)
    return [(event["first"], event["last"]) for event in events if event.get("event") == _WITHDRAWN]
