"""Training in parallel on this machine: muster beside DeepSpeed (ZeRO, pipeline) and accelerate (DDP), bf16, two ranks.

    python benchmarks/deepspeed_cpu.py [--json FILE] [--rounds N] [--quick] [--only NAME]

DeepSpeed trains transformers' LlamaForCausalLM of the same shape with torch's fused AdamW, as its users do, on its CPU
accelerator over gloo. It is installed once, into an environment of its own (build/deepspeed). Both
sides of a cell run in fresh processes, in turn; reported are the ratio of tokens/s and that of
peak memory of a rank, and whether the project's goals for them hold.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import cells
import deepspeed_pipeline
import train_cpu
from cells import Cell

ENVIRONMENT = Path(__file__).parent.parent / "build" / "deepspeed"
PACKAGES = ("deepspeed==0.19.8", "transformers==5.23.0", "numpy")
RANKS = 2
PIPELINE_MICROBATCHES = 8


@dataclass(frozen=True)
class Contest:
    name: str
    cell: Cell
    peer: str
    speed_goal: float
    """Least ratio of tokens/s, ours to theirs."""


def main() -> None:
    sides = {
        "muster": cells.run_muster,
        "deepspeed": run_deepspeed,
        "deepspeed pipeline": deepspeed_pipeline.run,
        "accelerate": train_cpu.run_transformers,
    }
    if cells.run_side(sides):
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side of a cell")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run, not how fast")
    parser.add_argument("--only", help="just the cells of this name")
    arguments = parser.parse_args()
    install()
    rounds, steps = (1, 2) if arguments.quick else (arguments.rounds, 5)
    rows = []
    print(header())
    for contest in contests():
        if arguments.only in (None, contest.name):
            rows.append(compare(contest, rounds, steps))
            print(line(rows[-1]), flush=True)
    print(f"geometric mean of the ratios: {statistics.geometric_mean(row['ratio'] for row in rows):.2f}")
    if arguments.json:
        result = {"machine": cells.machine(), "date": date.today().isoformat(), "packages": PACKAGES}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result | {"cells": rows}, indent=1) + "\n")


def contests() -> Iterator[Contest]:
    for size, shape in cells.SHAPES.items():
        yield Contest("ddp", train_cpu.data_parallel(size, "bf16", RANKS, 1), "accelerate", 1.2)
        for stage, goal in ((1, 1.2), (2, 1.2), (3, 1.3)):
            cell = Cell(
                size=size, precision="bf16", processes=RANKS, threads=1, rows=shape["rows"], parts=RANKS,
                layout={"shard": RANKS, "zero": stage},
            )  # fmt: skip
            yield Contest(f"zero-{stage}", cell, "deepspeed", goal)
        cell = Cell(
            size=size, precision="bf16", processes=RANKS, threads=1, rows=shape["rows"] // 2, parts=1,
            microbatches=PIPELINE_MICROBATCHES, layout={"pipeline": RANKS},
        )  # fmt: skip
        yield Contest("pipeline", cell, "deepspeed pipeline", 1.2)


def compare(contest: Contest, rounds: int, steps: int) -> dict[str, Any]:
    start = functools.partial(cells.launch, Path(__file__), cell=contest.cell, steps=steps)
    python, more = Path(sys.executable), {}
    if contest.peer.startswith("deepspeed"):
        bin_folder = ENVIRONMENT / "bin"
        # On the path as well: DeepSpeed looks for ninja there, which builds its shared-memory reduction.
        path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
        own = {"TORCH_EXTENSIONS_DIR": str(ENVIRONMENT / "extensions"), "PYTHONPATH": "", "PATH": path}
        python, more = bin_folder / "python", {"DS_ACCELERATOR": "cpu"} | own
    starts = {
        "muster": functools.partial(start, "muster", python=Path(sys.executable), more={}),
        "peer": functools.partial(start, contest.peer, python=python, more=more),
    }
    seen = cells.compare(starts, rounds)
    ours, theirs = seen["muster"], seen["peer"]
    return {
        "name": contest.name,
        "size": contest.cell.size,
        "peer": contest.peer,
        "muster_tokens_per_s": ours["tokens_per_s"],
        "peer_tokens_per_s": theirs["tokens_per_s"],
        "ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "speed_goal": contest.speed_goal,
        "muster_rss_bytes": ours["rss_bytes"],
        "peer_rss_bytes": theirs["rss_bytes"],
        "rss_ratio": ours["rss_bytes"] / theirs["rss_bytes"],
    }


def header() -> str:
    return (
        f"{'':10}{'model':>6}  {'peer':20}{'muster tok/s':>13}{'peer':>8}{'ratio':>7}{'goal':>6}{'RSS':>9}"
        f"{'peer':>9}{'ratio':>7}"
    )


def line(row: dict[str, Any]) -> str:
    missed = [row["ratio"] < row["speed_goal"], row["rss_ratio"] > 1]
    note = "  missed: " + ", ".join(
        what for what, is_missed in zip(("speed", "memory"), missed, strict=True) if is_missed
    )
    return (
        f"{row['name']:10}{row['size']:>6}  {row['peer']:20}{row['muster_tokens_per_s']:13.0f}"
        f"{row['peer_tokens_per_s']:8.0f}{row['ratio']:7.2f}{row['speed_goal']:6.1f}"
        f"{row['muster_rss_bytes'] / 1e9:7.2f}GB{row['peer_rss_bytes'] / 1e9:7.2f}GB{row['rss_ratio']:7.2f}"
        f"{note if any(missed) else ''}"
    )


def install() -> None:
    """DeepSpeed in an environment of its own, where that is not done yet."""
    for lock in ENVIRONMENT.glob("extensions/**/lock"):
        lock.unlink()  # of a build that was killed: torch would wait for it without end
    done = ENVIRONMENT / "installed"
    if done.exists() and done.read_text() == "\n".join(PACKAGES):
        return
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    # torch first and alone, so that nothing else decides which build of it is taken.
    subprocess.run([*pip, "torch==2.13.0"], check=True)
    subprocess.run([*pip, "setuptools", *PACKAGES], check=True)
    done.write_text("\n".join(PACKAGES))


def run_deepspeed(cell: Cell, steps: int, out: Path) -> None:
    """transformers' LlamaForCausalLM in a ZeRO engine, with bf16 parameters and fp32 master weights."""
    import deepspeed
    import torch
    import transformers

    torch.set_num_threads(cell.threads)
    transformers.utils.logging.set_verbosity_error()
    deepspeed.init_distributed(dist_backend="gloo")
    model = transformers.LlamaForCausalLM(cells.llama_config(cell))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        config=deepspeed_pipeline.engine_config(cell) | {"zero_optimization": {"stage": cell.layout["zero"]}},
    )
    ends = []
    for step in range(cells.WARM_UP_STEPS + steps):
        tokens = torch.from_numpy(cells.rows(cell, int(os.environ["RANK"]), step)[:, :-1])
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        ends.append(cells.now())
    cells.write(out, cell, ends)


if __name__ == "__main__":
    main()
