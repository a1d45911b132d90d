"""The table of promises about faults: each put to the test with real processes, signals and files.

    python benchmarks/faults.py [--full] [--only WORDS] [--json FILE]

The short form takes some minutes and runs a few trials of each; `--full` runs as many as the promises are worth
(hundreds of kills, a thousand flipped bits), which takes an hour. A row that is not kept says what happened, and the
exit code is 1. What each trial does is told by the module that it is in: faults_checkpoint.py, faults_chaos.py,
faults_groups.py, faults_hang.py, faults_numbers.py and faults_restart.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import cells
import faults_chaos
import faults_checkpoint
import faults_groups
import faults_hang
import faults_numbers
import faults_restart


@dataclass(frozen=True, slots=True)
class Row:
    """One promise, and what became of it."""

    promise: str
    trials: int
    kept: int
    said: str = ""
    """A figure, or what happened where it was not kept."""


Trials = Callable[[Path, bool], Iterator[Row]]
"""Yields rows, given a scratch folder and whether the full form is asked for."""


def checkpoints(scratch: Path, full: bool) -> Iterator[Row]:
    """Nothing that happens to a save or to a file harms a run unseen."""
    from muster.cli._verify import damage

    multiprocessing.set_forkserver_preload(["muster.checkpoint.state", "torch._dynamo"])
    series = {
        "a crash at every call of a save leaves a sound checkpoint": lambda: (
            faults_checkpoint.crash_at_every_call(scratch)
        ),
        "kill -9 at any moment of saving leaves a sound checkpoint": lambda: faults_checkpoint.kill_at_random(
            scratch, 200 if full else 10, seed=0
        ),
        "a flipped bit is found and its file named": lambda: faults_checkpoint.flip_bits(
            scratch / "prepared" / "step-00000002", 1000 if full else 50, 0, damage
        ),
    }
    for promise, run in series.items():
        outcome = run()
        bad = outcome.unloadable
        yield Row(promise, outcome.trials, outcome.trials - len(bad), bad[0] if bad else "")


def hangs(scratch: Path, full: bool) -> Iterator[Row]:
    """The rank that stopped, skipped, mismatched or failed is named."""
    chance = random.Random(0)
    kinds = {
        "stop": "SIGSTOP",
        "mismatch": "a mismatched collective",
        "shape": "a wrong shape",
        "skip": "a skipped collective",
        "kill": "kill -9",
    }
    for kind, what in kinds.items():
        done = []
        for number in range(25 if full else 3):
            folder = scratch / f"{kind}-{number}"
            folder.mkdir()
            fault = faults_hang.draw(kind, 3, chance)
            done.append(faults_hang.trial(fault, ranks=3, folder=folder, hang_after_s=2.0))
        slowest = max(trial.seconds for trial in done)
        yield Row(
            f"{what}: the culprit is named",
            len(done),
            sum(trial.named for trial in done),
            f"within {slowest:.1f} s (hang_after 2 s)",
        )


def numbers(scratch: Path, full: bool) -> Iterator[Row]:
    """A nan and a flipped bit are found in their step, and named."""
    for kind, promise in (
        ("poison", "a nan in one gradient: found in its step, parameter and rank named"),
        ("flip", "a flipped bit in one copy: found at the next comparison, parameter and ranks named"),
    ):
        found = [faults_numbers.trial(kind, seed, scratch) for seed in range(20 if full else 3)]
        missed = [said for said in found if said is not None]
        yield Row(promise, len(found), len(found) - len(missed), missed[0] if missed else "")


def restarts(scratch: Path, full: bool) -> Iterator[Row]:
    """A killed rank costs a restart, and the losses stay what they were."""
    for memory, path in ((False, ""), (True, ", from memory")):
        folder = scratch / f"memory-{memory}"
        folder.mkdir()
        done, equal = faults_restart.trials(folder, 30 if full else 3, seed=0, memory=memory)
        seconds = [restart.committed_s for restart in done]
        yield Row(
            f"kill -9 of a rank{path}: the loss curve equals the undisturbed one, bit for bit",
            len(done),
            len(done) * equal,
            f"next step committed after p50 {statistics.median(seconds):.1f} s, "
            f"p99 {faults_restart.quantile(seconds, 0.99):.1f} s",
        )


def groups(scratch: Path, full: bool) -> Iterator[Row]:
    """Replica groups: who is left goes on at once, and keeps what was done."""
    asked = faults_groups.options([] if full else ["--short"])
    found = faults_groups.measure(scratch, asked)  # raises where a sample is dealt twice, or left out
    kills = [kill["next_step_s"] for kill in found["kills"]]
    yield Row(
        "kill -9 of a group costs the others at most one step; every sample once",
        len(kills),
        len(kills) if found["aborted"] <= len(kills) == found["groups_ended"] else 0,
        f"next step committed after {faults_groups.said(kills)}",
    )
    goodput = found["goodput"]
    if full:
        yield Row(
            "a group killed every 60 s for 10 minutes: goodput of 90 % at least",
            1,
            int(goodput >= 0.9),
            f"{goodput:.1%}",
        )
    limit_s = asked.hang_after + 5
    yield Row(
        "SIGSTOP of a group: named within hang_after + 5 s, and the others go on",
        1,
        int(found["hang_named"] and found["named_s"] <= limit_s),
        f"named after {found['named_s']:.1f} s (hang_after {asked.hang_after:g} s), next step after "
        f"{found['hang_s']:.1f} s",
    )
    yield Row(
        "SIGTERM: all groups agree on a step, which is saved, and the command exits with 75",
        1,
        int(found["exit_code"] == 75 and found["stop_saved"]),
        f"within {found['stop_s']:.1f} s (grace 25 s)",
    )


def links(scratch: Path, full: bool) -> Iterator[Row]:
    """Late links change nothing but the time, broken ones are recovered from."""
    done = faults_chaos.trial(scratch, kinds="link", count=20 if full else 4, seed=0)
    yield _drilled("links of ranks delayed, stalled and reset: recovered, losses equal bit for bit", done)


def chaos(scratch: Path, full: bool) -> Iterator[Row]:
    """All kinds of faults, one after the other, in one run."""
    kinds = "kill,stop,slow,link,disk,flip,poison"
    done = faults_chaos.trial(scratch, kinds=kinds, count=70 if full else 10, seed=0)
    yield _drilled("muster chaos, all kinds: recovered, culprit named, losses equal bit for bit", done)


def _drilled(promise: str, done: faults_chaos.Drilled) -> Row:
    said = f"goodput {done.goodput}, longest recovery {done.longest}"
    return Row(promise, done.injected, done.kept, said if not done.error else done.error)


ALL: dict[str, Trials] = {
    "checkpoints": checkpoints,
    "hangs": hangs,
    "numbers": numbers,
    "restarts": restarts,
    "groups": groups,
    "links": links,
    "chaos": chaos,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="as many trials as the promises are worth")
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--json", type=Path, help="also write the rows there, beside those of the others")
    asked = parser.parse_args()
    broken = False
    for name in asked.only:
        begun = time.perf_counter()
        rows = []
        with tempfile.TemporaryDirectory(prefix="muster-faults-") as scratch:
            for row in ALL[name](Path(scratch), asked.full):
                rows.append(row)
                print(f"{row.promise:88}{row.kept:6} of {row.trials:<5} {row.said}", flush=True)
        print(f"({name}: {time.perf_counter() - begun:.0f} s)", flush=True)
        broken |= any(row.kept < row.trials for row in rows)
        if asked.json:
            keep(asked.json, name, rows, full=asked.full)
    sys.exit(broken)


def keep(path: Path, name: str, rows: list[Row], *, full: bool) -> None:
    """Write the rows of one part into a file that may hold those of others, each with its machine and date."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found[name] = {
        "machine": cells.machine(),
        "date": date.today().isoformat(),
        "full": full,
        "rows": [asdict(row) for row in rows],
    }
    ordered = {part: found[part] for part in ALL if part in found}
    path.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
