"""`muster train`: check everything, tokenise, start the ranks, and be a rank where one was started."""

from __future__ import annotations

import sys
from pathlib import Path


def train(run_file: Path, *overrides: str, runs: Path = Path("runs")) -> None:
    """Train a model, on as many local ranks as its layout says; run it again to resume.

    Parameters
    ----------
    run_file
        The run file (YAML); `muster init` writes one.
    overrides
        Changes to it, as key.path=value: train.tokens=2M layout.shard=2
    runs
        Folder of the runs; this one's is RUNS/name.
    """
    from muster.config.load import load_run
    from muster.parallel.world import is_rank

    run = load_run(run_file, overrides)
    folder = runs / run.name
    if is_rank():
        from muster.resilience.agent import reported
        from muster.train.entry import run_rank

        with reported() as beat:
            run_rank(run, base=run_file.parent, folder=folder, beat=beat)
        return

    from muster.observe.progress import ByteProgress
    from muster.resilience.agent import start_ranks
    from muster.train import entry

    plan = entry.check(run, base=run_file.parent, folder=folder, progress=ByteProgress())
    for line in entry.describe(plan):
        sys.stdout.write(line + "\n")
    sys.stdout.flush()
    arguments = ["train", str(run_file), *overrides, "--runs", str(runs)]
    start_ranks(arguments, plan.layout.world, folder, entry.watchdog(plan))
