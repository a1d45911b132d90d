"""`muster runs`: the runs of a folder, one line each."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from muster.errors import UsageError


def runs(*, runs: Path = Path("runs"), json_: bool = False) -> None:
    """List the runs in a folder, with their state, progress and last figures.

    Parameters
    ----------
    runs
        Folder of the runs.
    json_
        Print JSON instead of a table.
    """
    from rich.console import Console
    from rich.table import Table

    from muster.observe.format import count, duration, size
    from muster.observe.view import view

    if not runs.is_dir():
        raise UsageError(f"there is no folder {runs}: `muster train` makes one, --runs names another")
    found = [seen for folder in sorted(runs.iterdir()) if (seen := view(folder)) is not None]
    if json_:
        sys.stdout.write(json.dumps([asdict(seen) for seen in found], indent=1) + "\n")
        return
    if not found:
        sys.stdout.write(f"no runs in {runs} yet: `muster train` makes them\n")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "step", "loss", "bits/byte", "tok/s", "size", "last record"):
        table.add_column(heading, justify="left" if heading in ("run", "state") else "right", no_wrap=True)
    for seen in found:
        table.add_row(
            seen.name,
            seen.state,
            f"{seen.step}/{'?' if seen.steps is None else seen.steps}",
            "-" if seen.loss is None else f"{seen.loss:.4f}",
            "-" if seen.bits_per_byte is None else f"{seen.bits_per_byte:.4f}",
            "-" if seen.tokens_per_s is None else count(seen.tokens_per_s),
            size(seen.size_bytes),
            "-" if seen.age_s is None else f"{duration(seen.age_s)} ago",
        )
    # A pipe gets every column whole, however narrow the terminal that it was started from.
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else 1000).print(table)
