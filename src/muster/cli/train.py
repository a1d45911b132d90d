"""`muster train`: check everything, tokenise, start the ranks, and be a rank where one was started."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from muster.errors import UsageError


def train(
    run_file: Path,
    *overrides: str,
    runs: Path = Path("runs"),
    nodes: str = "1",
    rendezvous: str | None = None,
    ranks_per_node: int | None = None,
) -> None:
    """Train a model, on as many local ranks as its layout says; run it again to resume.

    Parameters
    ----------
    run_file
        The run file (YAML); `muster init` writes one.
    overrides
        Changes to it, as key.path=value: train.tokens=2M layout.shard=2
    runs
        Folder of the runs; this one's is RUNS/name. Several nodes need to share it.
    nodes
        Machines that train together, N or LEAST:MOST; give the same command on each.
    rendezvous
        Where they meet, as HOST:PORT: one of them, and a free port of it.
    ranks_per_node
        Ranks that this machine can hold. Default: its GPUs, else its cores.
    """
    from muster.parallel.world import is_rank

    if is_rank():
        from muster.resilience.lifeline import reported

        with reported() as lifeline:
            from muster.config.load import load_run
            from muster.train.entry import run_rank

            if "MUSTER_CHAOS_ORDERS" in os.environ:  # `muster chaos` started this run
                from muster.chaos import within

                within.enter()
            run = load_run(run_file, overrides)
            run_rank(run, base=run_file.parent, folder=runs / run.name, lifeline=lifeline)
        return

    from muster.config.load import load_run

    least, most = _nodes(nodes, rendezvous)
    run = load_run(run_file, overrides)

    from muster.resilience.ranks import Zygote

    with Zygote() as zygote:  # loads torch while this process does the same and tokenises
        from muster.observe.progress import ByteProgress
        from muster.resilience.agent import Nodes, start_ranks
        from muster.resilience.rendezvous import parse_address
        from muster.train import entry

        folder = runs / run.name
        address = None if rendezvous is None else parse_address(rendezvous)
        plan = entry.check(run, base=run_file.parent, folder=folder, progress=ByteProgress())
        for line in entry.describe(plan):
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
        argv = ["train", str(run_file), "--runs", str(runs), *overrides]
        if run.faults.elastic:
            if address is not None:
                raise UsageError(
                    "faults.elastic works on one machine as yet: leave out --nodes and --rendezvous"
                )
            from muster.resilience.groups import start_groups

            copies = plan.layout.replicate
            job = entry.job(plan, argv, alone=True)
            start_groups(job, copies, plan.layout.world // copies, run.faults.timeouts, zygote)
            return
        slots = plan.layout.world if address is None else ranks_per_node or entry.slots()
        job = entry.job(plan, argv, alone=address is None)
        start_ranks(job, Nodes(minimum=least, maximum=most, rendezvous=address, slots=slots), zygote)


def _nodes(said: str, rendezvous: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,5})(?::([1-9][0-9]{0,5}))?", said)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise UsageError(f"--nodes should be N or LEAST:MOST, for example 2 or 2:4 (got '{said}')")
    least, most = int(match[1]), int(match[2] or match[1])
    if most > 1 and rendezvous is None:
        raise UsageError(f"--nodes {said} needs --rendezvous HOST:PORT, the same on each node")
    return least, most
