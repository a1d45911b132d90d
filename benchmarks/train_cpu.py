"""Training speed on this machine: muster beside transformers' Trainer (accelerate), same shapes, batches and precision.

    python benchmarks/train_cpu.py [--json FILE] [--rounds N] [--quick]

Each cell runs both sides in fresh processes, in turn, `rounds` times, and reports the median
tokens/s of the timed steps and their ratio. The peak is that of a 1024-cubed matrix product in the
same precision with one thread, measured in the same process; a cell's share is of peak x cores used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

SEQUENCE = 512
SHAPES: dict[str, dict[str, int]] = {
    "10M": {"layers": 8, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 704, "vocab": 8192, "rows": 4},
    "60M": {"layers": 10, "width": 512, "heads": 8, "kv_heads": 4, "ffn": 1408, "vocab": 32_000, "rows": 2},
}
PLACES = {"1 x 1": (1, 1), "1 x 2": (1, 2), "2 x 1": (2, 1)}
"""Processes x threads."""
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Cell:
    size: str
    precision: str
    place: str


def main() -> None:
    arguments = _arguments()
    if arguments.side:
        cell = Cell(arguments.size, arguments.precision, arguments.place)
        {"muster": run_muster, "transformers": run_transformers}[arguments.side](
            cell, arguments.steps, arguments.out
        )
        return
    cells = [
        Cell(size, precision, place) for size in SHAPES for precision in ("fp32", "bf16") for place in PLACES
    ]
    rows = []
    print(header())
    for cell in cells:
        rows.append(
            compare(
                cell, rounds=1 if arguments.quick else arguments.rounds, steps=2 if arguments.quick else 5
            )
        )
        print(line(rows[-1]), flush=True)
    geometric_mean = statistics.geometric_mean(row["ratio"] for row in rows)
    print(f"geometric mean of the ratios: {geometric_mean:.2f}")
    if arguments.json:
        result = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "versions": versions(),
            "cells": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result | {"geometric_mean": geometric_mean}, indent=1) + "\n")


def compare(cell: Cell, rounds: int, steps: int) -> dict[str, Any]:
    """Both sides of a cell in turn."""
    seen: dict[str, list[dict[str, float]]] = {"muster": [], "transformers": []}
    for _ in range(rounds):
        for side, results in seen.items():
            results.append(launch(side, cell, steps))
    rates = {
        side: statistics.median(result["tokens_per_s"] for result in results)
        for side, results in seen.items()
    }
    processes, threads = PLACES[cell.place]
    peak = statistics.median(result["peak_flops"] for result in seen["muster"])
    flops = seen["muster"][0]["flops_per_token"]
    return asdict(cell) | {
        "muster_tokens_per_s": rates["muster"],
        "transformers_tokens_per_s": rates["transformers"],
        "ratio": rates["muster"] / rates["transformers"],
        "mfu": rates["muster"] * flops / (peak * processes * threads),
        "muster_rss_bytes": max(result["rss_bytes"] for result in seen["muster"]),
        "transformers_rss_bytes": max(result["rss_bytes"] for result in seen["transformers"]),
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


def launch(side: str, cell: Cell, steps: int) -> dict[str, float]:
    """One side of a cell in processes of its own."""
    processes, threads = PLACES[cell.place]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", __file__, "--side", side, "--size", cell.size,
            "--precision", cell.precision, "--place", cell.place, "--steps", str(steps), "--out", str(out),
        ]  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=scratch, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{side} failed in {cell}:\n{done.stderr[:3000]}")
        result: dict[str, float] = json.loads(out.read_text())
        return result


def run_muster(cell: Cell, steps: int, out: Path) -> None:
    """This project's own training step, as `muster train` runs it, on given batches."""
    import torch

    from muster.observe.peak import gemm_peak_flops
    from muster.parallel.world import join
    from muster.train.trainee import COMPUTE_DTYPE, Trainee

    with join() as world:
        plan = _muster_plan(cell, world.size)
        trainee = Trainee(plan, world)
        batches = [_muster_batch(cell, world.rank, step) for step in range(WARM_UP_STEPS + steps)]
        tokens = world.size * SHAPES[cell.size]["rows"] * SEQUENCE
        ends = []
        for step, batch in enumerate(batches):
            trainee.update(step, [batch], tokens)
            ends.append(time.perf_counter())
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        peak = gemm_peak_flops(COMPUTE_DTYPE[cell.precision], world.device)
        torch.set_num_threads(threads)
        if world.is_first:
            _write(
                out,
                ends,
                tokens,
                {"peak_flops": peak, "flops_per_token": plan.spec.flops_per_token(SEQUENCE)},
            )


def _muster_plan(cell: Cell, ranks: int) -> Any:
    from types import SimpleNamespace

    from muster.config import schema
    from muster.model.build import spec_from_config
    from muster.parallel.layout import resolve

    shape = SHAPES[cell.size]
    model = schema.Model(
        family="llama", layers=shape["layers"], width=shape["width"], heads=shape["heads"],
        kv_heads=shape["kv_heads"], ffn=shape["ffn"], context=SEQUENCE, tied=False,
    )  # fmt: skip
    batch_tokens = ranks * shape["rows"] * SEQUENCE
    train = schema.Train(tokens=100 * batch_tokens, batch_tokens=batch_tokens, precision=cell.precision)
    run = schema.Run(
        name="bench", model=model, data=schema.Data(train=[schema.Source(files="*")]), train=train,
        layout=schema.Layout(replicate=ranks, microbatch=shape["rows"]),
    )  # fmt: skip
    spec = spec_from_config(model, shape["vocab"], Path())
    layout = resolve(run, spec, cores=ranks, gpus=0)
    return SimpleNamespace(run=run, spec=spec, layout=layout, steps=100, sequence=SEQUENCE, model_folder=None)


def _muster_batch(cell: Cell, rank: int, step: int) -> Any:
    import numpy as np

    from muster.data.packing import Batch

    rows = _rows(cell, rank, step)
    return Batch(rows[:, :-1].copy(), rows[:, 1:].copy(), np.zeros_like(rows[:, :-1], dtype=np.int32))


def run_transformers(cell: Cell, steps: int, out: Path) -> None:
    """transformers' LlamaForCausalLM under its Trainer, which runs accelerate; bf16 is autocast, as it does on CPU."""
    import torch
    import transformers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transformers.utils.logging.set_verbosity_error()
    shape = SHAPES[cell.size]
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["width"], intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=SEQUENCE, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    total = WARM_UP_STEPS + steps
    samples = [
        row for step in range(total) for place in range(world) for row in _rows(cell, place, step)[:, :-1]
    ]
    dataset = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in samples]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch, use_cpu=True, bf16=cell.precision == "bf16", max_steps=total,
            per_device_train_batch_size=shape["rows"], optim="adamw_torch_fused", max_grad_norm=1.0,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            ddp_backend="gloo" if world > 1 else None,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()]
        )
        trainer.train()
    if rank == 0:
        _write(out, ends, world * shape["rows"] * SEQUENCE, {})


def _rows(cell: Cell, rank: int, step: int) -> Any:
    """Token ids (rows, T + 1) of one process in one step; the same for both sides."""
    import numpy as np

    shape = SHAPES[cell.size]
    generator = np.random.default_rng([step, rank])
    return generator.integers(0, shape["vocab"], (shape["rows"], SEQUENCE + 1), dtype=np.int64)


def _write(out: Path, ends: list[float], tokens: int, extra: dict[str, float]) -> None:
    import resource

    timed = [
        after - before for before, after in zip(ends[WARM_UP_STEPS - 1 :], ends[WARM_UP_STEPS:], strict=False)
    ]
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = tokens / statistics.median(timed)
    out.write_text(json.dumps({"tokens_per_s": rate, "rss_bytes": rss} | extra))


def machine() -> str:
    model = next(
        (
            row.split(":")[1].strip()
            for row in Path("/proc/cpuinfo").read_text().splitlines()
            if row.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate", "musterllm")} | {
        "python": platform.python_version()
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side of a cell")
    parser.add_argument("--quick", action="store_true", help="one short round: does it run, not how fast")
    for name in ("side", "size", "precision", "place"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
