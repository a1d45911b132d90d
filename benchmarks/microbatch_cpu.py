"""How many tokens one forward pass should take on a CPU: speed and memory of a step of 8,192 tokens, cut differently.

    python benchmarks/microbatch_cpu.py [--rounds N] [--json FILE]

One process with one thread, 10 M parameters, bf16, sequences of 512; each cut in fresh processes, in turn. The
budget in `muster.parallel.layout` follows from it. Tokens are counted by processor time, which a
neighbour on the machine disturbs little.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from datetime import date
from pathlib import Path

import cells
from cells import SEQUENCE, Cell

STEP_SEQUENCES = 16


def main() -> None:
    if cells.run_side({"muster": cells.run_muster}):
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    starts = {
        rows * SEQUENCE: functools.partial(
            cells.launch, Path(__file__), "muster", cut(rows), arguments.steps, python=Path(sys.executable), more={}
        )
        for rows in (1, 2, 4, 8, 16)
    }  # fmt: skip
    seen = cells.compare({str(tokens): start for tokens, start in starts.items()}, arguments.rounds)
    rows = [
        {"microbatch_tokens": int(tokens)}
        | {name: figures[name] for name in ("tokens_per_cpu_s", "tokens_per_s", "rss_bytes")}
        for tokens, figures in seen.items()
    ]
    print(f"{'tokens':>6}{'per cpu s':>11}{'per s':>8}{'memory':>10}")
    for row in rows:
        memory = f"{row['rss_bytes'] / 1e9:8.2f}GB"
        print(
            f"{row['microbatch_tokens']:6}{row['tokens_per_cpu_s']:11.0f}{row['tokens_per_s']:8.0f}{memory}"
        )
    if arguments.json:
        result = {"machine": cells.machine(), "date": date.today().isoformat(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def cut(rows: int) -> Cell:
    """A step in microbatches of `rows` sequences."""
    return Cell(
        size="10M", precision="bf16", processes=1, threads=1, rows=rows, microbatches=STEP_SEQUENCES // rows,
        parts=1, layout={"replicate": 1},
    )  # fmt: skip


if __name__ == "__main__":
    main()
