"""Replica groups of forked ranks that kill themselves at given moments of a step, and the audit of what is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from muster.checkpoint import shelf
from muster.config.faults import Timeouts
from muster.config.load import load_resolved
from muster.observe.records import read_jsonl
from muster.resilience.agent import Job
from muster.resilience.between import GROUP
from muster.resilience.groups import start_groups
from muster.resilience.ledger import LEDGER
from muster.resilience.watchdog import Watchdog

Peril = tuple[int, int, str]
"""Group, step (from 1), moment of kill -9: forward, reduce, vote, voted, apply or hand; or another peril."""

TIMEOUTS = Timeouts(collective=20.0, vote=25.0, quorum=40.0, supervisor=60.0)


class ForkedRanks:
    """What `zygote.py` is to a run, with ranks that are in peril."""

    def __init__(self, *arguments: Any) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._arguments, self._processes = arguments, list[Any]()

    def start(self, argv: Sequence[str], env: dict[str, str], log: Path | None) -> int:
        process = self._context.Process(target=_rank, args=(env, *self._arguments), daemon=True)
        process.start()
        self._processes.append(process)
        return len(self._processes) - 1

    def pid(self, asked: int) -> int | None:
        pid: int | None = self._processes[asked].pid
        return pid

    def code(self, asked: int) -> int | None:
        code: int | None = self._processes[asked].exitcode
        return code

    def signal(self, asked: int, number: signal.Signals) -> None:
        if self.code(asked) is None:
            os.kill(self._processes[asked].pid, number)

    def forget(self, asked: int) -> None:
        pass

    def read(self, *, wait: bool = True) -> None:
        time.sleep(0.001 if wait else 0)


def train_groups(
    run: dict[str, Any],
    base: Path,
    folder: Path,
    *,
    perils: Sequence[Peril] = (),
    timeouts: Timeouts = TIMEOUTS,
) -> None:
    """Train to the end, with the groups of `run["layout"]`; who dies is waited for before the next step.

    Other perils: `stop` and `stop-voted` (SIGSTOP in the passes, or when the vote is sent), `term` (SIGTERM), `nan` (of
    the loss), `error` (whenever that step is taken; then nobody waits for who is missing).
    """
    layout = run["layout"]
    ranks = 1
    for axis, degree in layout.items():
        ranks *= degree if axis in ("shard", "tensor", "pipeline", "context") else 1
    folder.mkdir(parents=True, exist_ok=True)
    resolved = load_resolved(run)
    job = Job(
        argv=[],
        folder=folder,
        digest="",
        fit=lambda _: None,
        needs="",
        committed=lambda: max(shelf.steps(folder / "checkpoints"), default=0),
        restarts=resolved.faults.restarts,
        grace_s=resolved.faults.grace,
        watch=lambda place: Watchdog(
            folder, place.ranks, hang_after_s=resolved.faults.hang_after, name=place.name
        ),
    )
    forks = ForkedRanks(run, str(base), str(folder), perils)
    start_groups(job, layout["replicate"], ranks, timeouts, forks, lambda _: None)


def audit(folder: Path, steps: int, per_step: int, perils: Sequence[Peril]) -> None:
    """Every sample of every step once; every step the same on all groups that took it; few steps done twice."""
    ledger = read_jsonl(folder / LEDGER)
    assert [line["step"] for line in ledger] == list(range(1, steps + 1))
    for line in ledger:
        dealt = [sample for spans in line["samples"].values() for a, b in spans for sample in range(a, b)]
        assert sorted(dealt) == list(range((line["step"] - 1) * per_step, line["step"] * per_step)), line
    events = read_jsonl(folder / "events.jsonl")
    killed = [e for e in events if e["event"] == "group-ended"]
    assert len(killed) == len(perils), killed
    assert all("SIGKILL" in e["message"] for e in killed), killed
    aborted = [e for e in events if e["event"] == "regrouped" and e["aborted"]]
    assert len(aborted) <= len(perils)
    sums: dict[tuple[int, int], set[int]] = {}
    for record in read_jsonl(folder / "sums.jsonl"):
        sums.setdefault((record["rank"], record["step"]), set()).add(record["sum"])
    assert {step for _, step in sums} == set(range(1, steps + 1))
    assert all(len(found) == 1 for found in sums.values()), sums
    last = [r for r in read_jsonl(folder / "sums.jsonl") if r["step"] == steps]
    assert len({r["group"] for r in last}) == len(
        {e["group"] for e in events if e["event"] == "group-started"}
    )


def _rank(
    environment: dict[str, str], run: dict[str, Any], base: str, folder: str, perils: Sequence[Peril]
) -> None:
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gloo's last words
    from muster.resilience.lifeline import reported
    from muster.train.entry import run_rank

    with reported() as lifeline:
        _imperil(Path(folder), perils, run["layout"]["replicate"])
        run_rank(load_resolved(run), base=Path(base), folder=Path(folder), lifeline=lifeline)


def _imperil(folder: Path, perils: Sequence[Peril], groups: int) -> None:
    """Patch this process: to die at its moments, to note checksums, and to wait for who is missing."""
    from muster.resilience import between
    from muster.train.group_rounds import MeetingGroups
    from muster.train.groups import GroupTraining
    from muster.train.rounds import local
    from muster.train.trainee import Trainee

    group, rank = int(os.environ[GROUP]), int(os.environ["RANK"])
    now = {"step": 0}
    failing = {group for group, _, moment in perils if moment == "error"}

    def is_time(moment: str) -> bool:
        for number, peril in enumerate(perils):
            # The last rank of a group: the others have to be ended for it.
            if peril == (group, now["step"], moment) and rank == int(os.environ["WORLD_SIZE"]) - 1:
                marker = folder / f"peril-{number}"
                if not marker.exists():
                    marker.touch()
                    return True
        return False

    def is_given_up() -> bool:
        return any(event["event"] == "group-given-up" for event in read_jsonl(folder / "events.jsonl"))

    def die(moment: str) -> None:
        if is_time(moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, moment: str, *, when: Callable[..., bool] = lambda *_: True) -> None:
        honest = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when(*args):
                die(moment)
            return honest(*args, **kwargs)

        setattr(owner, name, wrapped)

    def first(owner: Any, name: str, call: Callable[[Any], None]) -> None:
        honest = getattr(owner, name)

        def both(self: Any) -> None:
            call(self)
            honest(self)

        setattr(owner, name, both)

    accumulate, send, enter = Trainee.accumulate, between.Between._send, between.Between.enter
    parts = between._parts

    def accumulate_there(self: Any, step: int, *rest: Any) -> Any:
        now["step"] = step + 1
        die("forward")
        if (group, step + 1, "error") in perils:
            raise ValueError(f"planted in group {group}")
        if is_time("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if is_time("term"):
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(self, step, *rest) * (float("nan") if is_time("nan") else 1.0)

    def parts_there(flats: Any) -> Any:
        for number, part in enumerate(parts(flats)):
            if number == 1:  # the first has been sent off
                time.sleep(0.01)
                die("reduce")
            yield part

    def send_there(self: Any, message: Any) -> None:
        if message["kind"] == "vote" and message["note"]:
            die("vote")
        send(self, message)
        if message["kind"] == "vote" and message["note"]:
            die("voted")
            if is_time("stop-voted"):
                os.kill(os.getpid(), signal.SIGSTOP)

    def enter_there(self: Any, load: Any) -> None:
        (folder / f"ready-{group}").touch()
        enter(self, load)
        (folder / f"ready-{group}").unlink(missing_ok=True)

    def wait_there(self: Any) -> None:
        missing = set(range(groups)) - set(self.between.members) if not failing else ()
        deadline = time.monotonic() + 15
        while not all((folder / f"ready-{m}").exists() for m in missing) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1 if missing else 0)  # for the hello to arrive
        deadline = time.monotonic() + 1
        while failing == {1} and not is_given_up() and time.monotonic() < deadline:
            time.sleep(0.02)

    def apply_there(self: Any, step: int, *rest: Any) -> Any:
        die("apply")
        return apply(self, step, *rest)

    def took_there(self: Any, update: Any, **named: Any) -> None:
        took(self, update, **named)
        shared = self.trainee.sync.state({})  # of groups that train apart, else all they hold
        value = 0
        for tensor in shared.values() if shared else self.trainee.shards():
            value = zlib.crc32(local(tensor.detach()).contiguous().numpy(), value)
        line = f'{{"group": {group}, "rank": {rank}, "step": {self.step}, "sum": {value}}}\n'
        with (folder / "sums.jsonl").open("ab", buffering=0) as file:
            file.write(line.encode())

    apply, took = Trainee.apply, GroupTraining._took
    GroupTraining._took = took_there  # type: ignore[method-assign]
    Trainee.accumulate, Trainee.apply = accumulate_there, apply_there  # type: ignore[assignment, method-assign]
    between.Between._send, between.Between.enter = send_there, enter_there  # type: ignore[method-assign]
    between._parts = parts_there  # type: ignore[assignment, method-assign]
    before(between.Between, "send", "hand")
    for loop in (GroupTraining, MeetingGroups):
        first(loop, "_take_step", wait_there)
