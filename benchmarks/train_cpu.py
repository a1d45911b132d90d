"""Training speed on this machine: muster beside transformers' Trainer (accelerate), same shapes, batches and precision.

    python benchmarks/train_cpu.py [--json FILE] [--rounds N] [--quick]

Each cell runs both sides in fresh processes, in turn, `rounds` times, and reports the median
tokens/s of the timed steps and their ratio. The peak is that of a 1024-cubed matrix product in the
same precision with one thread, measured in the same process; a cell's share is of peak x cores used.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cells
from cells import Cell

PLACES = ((1, 1), (1, 2), (2, 1))
"""Processes and threads."""


def main() -> None:
    if cells.run_side({"muster": cells.run_muster, "transformers": run_transformers}):
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side of a cell")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run, not how fast")
    arguments = parser.parse_args()
    rounds, steps = (1, 2) if arguments.quick else (arguments.rounds, 5)
    rows = []
    print(header())
    for cell in (
        data_parallel(size, precision, *place)
        for size in cells.SHAPES
        for precision in ("fp32", "bf16")
        for place in PLACES
    ):
        rows.append(compare(cell, rounds, steps))
        print(line(rows[-1]), flush=True)
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    print(f"geometric mean of the ratios: {mean:.2f}")
    if arguments.json:
        result = {"machine": cells.machine(), "date": date.today().isoformat(), "versions": versions()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps(result | {"cells": rows, "geometric_mean": mean}, indent=1) + "\n"
        )


def data_parallel(size: str, precision: str, processes: int, threads: int) -> Cell:
    """Every process has the whole model and its own rows of the batch."""
    return Cell(
        size=size, precision=precision, processes=processes, threads=threads, rows=cells.SHAPES[size]["rows"],
        parts=processes, layout={"replicate": processes},
    )  # fmt: skip


def compare(cell: Cell, rounds: int, steps: int) -> dict[str, Any]:
    """Both sides of a cell in turn."""
    script, python = Path(__file__), Path(sys.executable)
    starts = {
        side: functools.partial(cells.launch, script, side, cell, steps, python=python, more={})
        for side in ("muster", "transformers")
    }
    seen = cells.compare(starts, rounds)
    ours, theirs = seen["muster"], seen["transformers"]
    peak = ours["peak_flops"] * cell.processes * cell.threads
    return {
        "size": cell.size,
        "precision": cell.precision,
        "place": f"{cell.processes} x {cell.threads}",
        "muster_tokens_per_s": ours["tokens_per_s"],
        "transformers_tokens_per_s": theirs["tokens_per_s"],
        "ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "mfu": ours["tokens_per_s"] * ours["flops_per_token"] / peak,
        "muster_rss_bytes": ours["rss_bytes"],
        "transformers_rss_bytes": theirs["rss_bytes"],
    }


def header() -> str:
    return (
        f"{'model':6}{'precision':>10}{'procs x threads':>17}{'muster tok/s':>14}{'transformers':>14}{'ratio':>7}"
        f"{'of peak':>9}{'RSS':>10}{'theirs':>10}"
    )


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['size']:6}{row['precision']:>10}{row['place']:>17}{row['muster_tokens_per_s']:14.0f}"
        f"{row['transformers_tokens_per_s']:14.0f}{row['ratio']:7.2f}{row['mfu']:9.0%}"
        f"{row['muster_rss_bytes'] / 1e9:8.2f}GB{row['transformers_rss_bytes'] / 1e9:8.2f}GB"
    )


def run_transformers(cell: Cell, steps: int, out: Path) -> None:
    """transformers' LlamaForCausalLM under its Trainer, which runs accelerate; bf16 is autocast, as it does on CPU."""
    import torch
    import transformers

    torch.set_num_threads(cell.threads)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM(cells.llama_config(cell))
    ends: list[cells.Stamp] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(cells.now())

    world, total = int(os.environ["WORLD_SIZE"]), cells.WARM_UP_STEPS + steps
    samples = [
        row for step in range(total) for part in range(world) for row in cells.rows(cell, part, step)[:, :-1]
    ]
    dataset = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in samples]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch, use_cpu=True, bf16=cell.precision == "bf16", max_steps=total,
            per_device_train_batch_size=cell.rows, optim="adamw_torch_fused", max_grad_norm=1.0,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            ddp_backend="gloo" if world > 1 else None,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()]
        )
        trainer.train()
    cells.write(out, cell, ends)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "musterllm")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


if __name__ == "__main__":
    main()
