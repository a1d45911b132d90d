"""Replica groups of forked ranks that kill themselves at given moments of a step, and the audit of what is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from muster.config.faults import Timeouts
from muster.observe.records import read_jsonl
from muster.resilience.between import GROUP
from muster.resilience.groups import LEDGER, Groups

Peril = tuple[int, int, str]
"""Group, step (from 1), moment: forward, reduce, vote, voted, apply or hand."""

TIMEOUTS = Timeouts(collective=20.0, vote=25.0, quorum=40.0, supervisor=60.0)


class ForkedChild:
    def __init__(self, process: Any) -> None:
        self._process, self.pid = process, process.pid

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def kill(self) -> None:
        self._process.kill()


def train_groups(
    run: dict[str, Any],
    base: Path,
    folder: Path,
    *,
    perils: Sequence[Peril] = (),
    timeouts: Timeouts = TIMEOUTS,
) -> None:
    """Train to the end, with the groups of `run["layout"]`; who dies is waited for before the next step."""
    layout = run["layout"]
    ranks = 1
    for axis, degree in layout.items():
        ranks *= degree if axis in ("shard", "tensor", "pipeline", "context") else 1
    context = multiprocessing.get_context("forkserver")
    folder.mkdir(parents=True)
    (folder / "logs").mkdir()

    def start(environment: Mapping[str, str]) -> ForkedChild:
        arguments = (dict(environment), run, str(base), str(folder), perils)
        process = context.Process(target=_rank, args=arguments, daemon=True)
        process.start()
        return ForkedChild(process)

    Groups(layout["replicate"], ranks, folder, timeouts, start, lambda _: None).run()


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
    from muster.config.load import load_resolved
    from muster.resilience.lifeline import reported
    from muster.train.entry import run_rank

    with reported():
        _imperil(Path(folder), perils, run["layout"]["replicate"])
        run_rank(load_resolved(run), base=Path(base), folder=Path(folder))


def _imperil(folder: Path, perils: Sequence[Peril], groups: int) -> None:
    """Patch this process: to die at its moments, to note checksums, and to wait for who is missing."""
    from muster.resilience import between
    from muster.train.groups import GroupTraining
    from muster.train.trainee import Trainee

    group, rank = int(os.environ[GROUP]), int(os.environ["RANK"])
    now = {"step": 0}

    def die(moment: str) -> None:
        for number, peril in enumerate(perils):
            # The last rank of a group: the others have to be ended for it.
            if peril == (group, now["step"], moment) and rank == int(os.environ["WORLD_SIZE"]) - 1:
                marker = folder / f"peril-{number}"
                if not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, moment: str, *, when: Callable[..., bool] = lambda *_: True) -> None:
        honest = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when(*args):
                die(moment)
            return honest(*args, **kwargs)

        setattr(owner, name, wrapped)

    accumulate, send, enter = Trainee.accumulate, between.Between._send, between.Between.enter
    parts, update = between._parts, GroupTraining._update

    def accumulate_there(self: Any, step: int, *rest: Any) -> Any:
        now["step"] = step + 1
        die("forward")
        return accumulate(self, step, *rest)

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

    def enter_there(self: Any, load: Any) -> None:
        (folder / f"ready-{group}").touch()
        enter(self, load)
        (folder / f"ready-{group}").unlink(missing_ok=True)

    def update_there(self: Any) -> Any:
        missing = set(range(groups)) - set(self.between.members)
        deadline = time.monotonic() + 15
        while not all((folder / f"ready-{m}").exists() for m in missing) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1 if missing else 0)  # for the hello to arrive
        return update(self)

    def apply_there(self: Any, step: int, *rest: Any) -> Any:
        die("apply")
        update = apply(self, step, *rest)
        value = 0
        for tensor in self.shards():
            value = zlib.crc32(tensor.detach().contiguous().numpy(), value)
        line = f'{{"group": {group}, "rank": {rank}, "step": {step + 1}, "sum": {value}}}\n'
        with (folder / "sums.jsonl").open("ab", buffering=0) as file:
            file.write(line.encode())
        return update

    apply = Trainee.apply
    Trainee.accumulate, Trainee.apply = accumulate_there, apply_there  # type: ignore[assignment, method-assign]
    between.Between._send, between.Between.enter = send_there, enter_there  # type: ignore[method-assign]
    between._parts, GroupTraining._update = parts_there, update_there  # type: ignore[assignment, method-assign]
    before(between.Between, "send", "hand")
