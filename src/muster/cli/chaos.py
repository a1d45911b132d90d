"""`muster chaos`: train under faults that are injected for real, by a seed, and tell what became of each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from muster.errors import ParityError, TrainingError, UsageError

if TYPE_CHECKING:
    from muster.chaos.drill import Drill
    from muster.chaos.schedule import Kind
    from muster.config import schema

_TOLERANCE = 1e-5
"""Relative, of the losses of replica groups: sums over fewer groups round differently."""


def chaos(
    run_file: Path,
    *overrides: str,
    faults: str | None = None,
    seed: int = 0,
    every: str = "30s",
    count: int | None = None,
    compare: bool = False,
    runs: Path = Path("runs"),
) -> None:
    """Train under faults: kill, stop and slow ranks, cut links, fill the disk, flip bits, poison gradients.

    Trains on this machine as `muster train` does, to the run's end, and strikes it at random times. Every fault
    is real, and strikes only processes, connections and files of this run. Exit code 1 where one was not
    recovered from or not named rightly, 4 where --compare finds another loss.

    Parameters
    ----------
    run_file
        The run file (YAML).
    overrides
        Changes to it, as key.path=value.
    faults
        Kinds, with commas between, of kill, stop, slow, link, disk, flip, poison. Default: all that the run allows.
    seed
        The same seed gives the same faults at the same times.
    every
        Mean time between two faults; the times are exponential.
    count
        Leave the run in peace after so many faults. Default: strike until it ends.
    compare
        Also train undisturbed, as NAME-undisturbed, and compare the loss of every step, bit for bit.
    runs
        Folder of the runs.
    """
    from muster.chaos.drill import Drill
    from muster.chaos.schedule import Shape, draw
    from muster.config.load import load_run
    from muster.train import entry

    run = load_run(run_file, overrides)
    kinds = _kinds(run, faults)
    every_s = _mean(every)
    folder = runs / run.name
    plan = entry.check(run, base=run_file.parent, folder=folder)
    for line in entry.describe(plan):
        _say(line)
    patience_s = run.faults.timeouts.vote if run.faults.elastic else run.faults.hang_after
    shape = Shape(ranks=plan.layout.world, patience_s=patience_s)
    argv = ["train", str(run_file), "--runs", str(runs), *overrides, "train.log_every=1"]
    _say(
        f"chaos   seed {seed}: {', '.join(kinds)}, one every {every_s:g} s; what the run says is in "
        f"{folder}/logs/drill.log"
    )
    drill = Drill(
        argv=argv,
        folder=folder,
        shape=shape,
        steps=plan.steps,
        elastic=run.faults.elastic,
        faults=islice(draw(seed, kinds, every_s, shape), count),
        say=_say,
    )
    # Ending as from Ctrl-C, it leaves no stopped rank and no full disk behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    drill.run()
    for line in table(drill):
        _say(line)
    if count is not None and len(drill.outcomes) < count:
        _say(
            f"the run was over after {len(drill.outcomes)} of {count} faults: train longer, or strike more often"
        )
    if drill.exit_code and not any(outcome.recovered_s is None for outcome in drill.outcomes):
        raise TrainingError(f"the run ended with exit code {drill.exit_code}: {_last_line(drill.log)}")
    bad = [o for o in drill.outcomes if o.recovered_s is None or o.named is False]
    if compare and not any(outcome.recovered_s is None for outcome in drill.outcomes):
        _compare(run, run_file, argv, runs)
    if bad:
        raise TrainingError(
            f"{len(bad)} of {len(drill.outcomes)} faults were not recovered from or not named rightly, the first "
            f"{bad[0].what}: {bad[0]}; look at {drill.log} and {folder / 'events.jsonl'}, and report this"
        )


def _mean(every: str) -> float:
    from muster.config.units import parse_seconds

    try:
        mean_s = parse_seconds(every)
    except ValueError as error:
        raise UsageError(f"--every {every}: {error}") from None
    if mean_s <= 0:
        raise UsageError(f"--every {every}: should be longer than nothing, for example 30s")
    return mean_s


def _kinds(run: schema.Run, asked: str | None) -> Sequence[Kind]:
    """Those that this run can survive; UsageError where it is asked for others."""
    from muster.chaos.schedule import KINDS, parse_kinds

    cannot: dict[Kind, str] = {}
    if run.faults.elastic:
        cannot["flip"] = "replica groups take their state from each other, and read no checkpoint again"
        cannot["poison"] = "under faults.elastic a bad step always stops the run"
    elif run.faults.on_nan == "stop" or run.train.sync is not None:
        cannot["poison"] = "this run is to stop at a bad step (faults.on_nan, train.sync)"
    if run.checkpoint.keep < 2:
        cannot["flip"] = "with checkpoint.keep: 1 there is no second checkpoint to fall back to"
    kinds = parse_kinds(asked) if asked else [kind for kind in KINDS if kind not in cannot]
    for kind in kinds:
        if kind in cannot:
            raise UsageError(f"--faults {kind} cannot be recovered from: {cannot[kind]}; leave it out")
    return kinds


def table(drill: Drill) -> list[str]:
    """What was injected and what became of it, by kind, and the goodput."""
    outcomes = drill.outcomes
    counts = Counter(outcome.fault.kind for outcome in outcomes)
    lines = [f"{'fault':10}{'injected':>9}{'recovered':>11}{'culprit named':>15}{'longest':>10}"]
    for kind in [*counts, "all"]:
        of = [outcome for outcome in outcomes if kind in ("all", outcome.fault.kind)]
        took = [outcome.recovered_s for outcome in of if outcome.recovered_s is not None]
        said = [outcome.named for outcome in of if outcome.named is not None]
        named = f"{sum(said)} of {len(said)}"
        longest = f"{max(took):.1f} s" if took else "-"
        lines.append(f"{kind:10}{len(of):9}{len(took):11}{named:>15}{longest:>10}")
    return [
        *lines,
        f"goodput {drill.goodput:.0%} of the time in committed new steps; exit code {drill.exit_code}",
    ]


def _compare(run: schema.Run, run_file: Path, argv: Sequence[str], runs: Path) -> None:
    from muster.chaos.drill import losses, withdrawn

    straight = runs / f"{run.name}-undisturbed"
    straight.mkdir(parents=True, exist_ok=True)
    known = [json.dumps(event) + "\n" for event in withdrawn(runs / run.name)]
    (straight / "events.jsonl").write_text("".join(known))
    _say(
        f"training {straight.name} without faults"
        + (f", and without {len(known)} withdrawn batches" if known else "")
    )
    command = [sys.executable, "-m", "muster", *argv, f"name={straight.name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingError(
            f"{straight.name} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    expected, found = losses(straight), losses(runs / run.name)
    limit = _TOLERANCE if run.faults.elastic else 0.0
    wrong = [
        step
        for step, loss in expected.items()
        if step not in found or abs(found[step] - loss) > limit * abs(loss)
    ]
    if run.faults.elastic:  # a leader that dies between a step and its report takes the figures with it
        wrong = [step for step in wrong if step in found]
    if wrong:
        raise ParityError(
            f"the losses of {len(wrong)} of {len(expected)} steps differ from the undisturbed run's, the first that "
            f"of step {wrong[0]} ({found.get(wrong[0])} instead of {expected[wrong[0]]}): report this"
        )
    how = f"within {limit:g}" if limit else "bit for bit"
    _say(f"the losses of all {len(expected)} steps equal the undisturbed run's, {how}")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"look at {log}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
