"""What the training benchmarks share: shapes, batches, fresh processes for each side, and muster's own side.

A cell is one comparison; a side is one contestant in it. Sides run in turn, each in processes of its own, started
by torch's launcher from the script that called. Imports nothing but the standard library at the
top, because a contestant may live in an environment without muster.
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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SEQUENCE = 512
SHAPES: dict[str, dict[str, int]] = {
    "10M": {"layers": 8, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 704, "vocab": 8192, "rows": 4},
    "60M": {"layers": 10, "width": 512, "heads": 8, "kv_heads": 4, "ffn": 1408, "vocab": 32_000, "rows": 2},
}
"""`rows` are the sequences of 512 tokens that one process takes at a time."""
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A shape, a precision, the processes and threads that work on it, and how they share the work."""

    size: str
    precision: str
    processes: int
    threads: int
    rows: int
    microbatches: int = 1
    parts: int
    """Processes that read batches of their own."""
    layout: dict[str, int] = field(default_factory=dict)
    """As in muster's run file."""

    @property
    def tokens(self) -> int:
        """Of one step, over all processes."""
        return self.parts * self.microbatches * self.rows * SEQUENCE


Stamp = tuple[float, float]
Side = Callable[[Cell, int, Path], None]
"""Trains a cell for a number of timed steps and leaves each rank's figures in a folder (`write`)."""


def run_side(sides: dict[str, Side]) -> bool:
    """In a process that `launch` started: do its part, and return True."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("side", "cell"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path)
    arguments, _ = parser.parse_known_args()
    if arguments.side is None:
        return False
    sides[arguments.side](Cell(**json.loads(arguments.cell)), arguments.steps, arguments.out)
    return True


def launch(
    script: Path, side: str, cell: Cell, steps: int, *, python: Path, more: dict[str, str]
) -> dict[str, float]:
    """One side of a cell in processes of its own; `more` joins their environment."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        command = [
            str(python), "-m", "torch.distributed.run", f"--nproc-per-node={cell.processes}", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(script), "--side", side,
            "--cell", json.dumps(asdict(cell)), "--steps", str(steps), "--out", str(out),
        ]  # fmt: skip
        own = {
            "OMP_NUM_THREADS": str(cell.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"
        }  # fmt: skip
        done = subprocess.run(
            command, env=os.environ | own | more, capture_output=True, text=True, cwd=scratch, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{side} failed in {cell}:\n{done.stderr[:6000]}")
        ranks = [json.loads(path.read_text()) for path in sorted(out.iterdir())]
        first: dict[str, float] = ranks[0]
        return first | {"rss_bytes": max(rank["rss_bytes"] for rank in ranks)}


def compare(starts: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Start each side in turn, `rounds` times: medians of each figure, but of memory the most."""
    seen: dict[str, list[dict[str, float]]] = {side: [] for side in starts}
    for _ in range(rounds):
        for side, start in starts.items():
            seen[side].append(start())
    return {
        side: {
            name: (max if name == "rss_bytes" else statistics.median)([result[name] for result in results])
            for name in results[0]
        }
        for side, results in seen.items()
    }


def now() -> Stamp:
    """Wall time, and this process's processor time, in seconds."""
    return time.perf_counter(), time.process_time()


def write(out: Path, cell: Cell, ends: list[Stamp], **extra: float) -> None:
    """A rank's figures, from the times at which its steps ended."""
    import resource

    timed = list(zip(ends[WARM_UP_STEPS - 1 :], ends[WARM_UP_STEPS:], strict=False))
    wall_s, cpu_s = (
        statistics.median(after[clock] - before[clock] for before, after in timed) for clock in (0, 1)
    )
    figures = {
        "tokens_per_s": cell.tokens / wall_s,
        "tokens_per_cpu_s": cell.tokens / (cpu_s * cell.processes),
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (out / f"{int(os.environ['RANK']):05}.json").write_text(json.dumps(figures | extra))


def rows(cell: Cell, part: int, step: int) -> Any:
    """Token ids (microbatches * rows, T + 1) of one part of one step's batch; the same for every side."""
    import numpy as np

    generator = np.random.default_rng([step, part])
    count = cell.microbatches * cell.rows
    return generator.integers(0, SHAPES[cell.size]["vocab"], (count, SEQUENCE + 1), dtype=np.int64)


def llama_config(cell: Cell) -> Any:
    """The shape as transformers knows it."""
    import transformers

    shape = SHAPES[cell.size]
    return transformers.LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["width"], intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=SEQUENCE, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip


def run_muster(cell: Cell, steps: int, out: Path) -> None:
    """This project's own training step, as `muster train` runs it, on given batches."""
    import torch

    from muster.observe.peak import gemm_peak_flops
    from muster.parallel.world import join
    from muster.train.trainee import COMPUTE_DTYPE, Trainee

    with join() as world:
        training = _training(cell, out)
        trainee = Trainee(training, world)
        ends = []
        for step in range(WARM_UP_STEPS + steps):
            trainee.update(step, _batches(cell, trainee.mesh.data_index, step), cell.tokens)
            ends.append(now())
        torch.set_num_threads(1)
        peak = gemm_peak_flops(COMPUTE_DTYPE[cell.precision], world.device)
        flops = training.spec.flops_per_token(SEQUENCE)
        write(out, cell, ends, peak_flops=peak, flops_per_token=flops)


def _training(cell: Cell, folder: Path) -> Any:
    from muster.config import schema
    from muster.model.build import spec_from_config
    from muster.parallel.layout import resolve
    from muster.train.plan import Training

    shape = SHAPES[cell.size]
    model = schema.Model(
        family="llama", layers=shape["layers"], width=shape["width"], heads=shape["heads"],
        kv_heads=shape["kv_heads"], ffn=shape["ffn"], context=SEQUENCE, tied=False,
    )  # fmt: skip
    train = schema.Train(tokens=100 * cell.tokens, batch_tokens=cell.tokens, precision=cell.precision)
    run = schema.Run(
        name="bench", model=model, data=schema.Data(train=[schema.Source(files="*")]), train=train,
        layout=schema.Layout(microbatch=cell.rows, **cell.layout),
    )  # fmt: skip
    spec = spec_from_config(model, shape["vocab"], Path())
    layout = resolve(run, spec, cores=cell.processes, gpus=0)
    return Training(
        run=run, folder=folder, spec=spec, layout=layout, model_folder=None, sequence=SEQUENCE, steps=100
    )


def _batches(cell: Cell, part: int, step: int) -> list[Any]:
    import numpy as np

    from muster.data.packing import Batch

    whole = rows(cell, part, step)
    pieces: Iterable[Any] = np.split(whole, cell.microbatches)
    return [
        Batch(piece[:, :-1].copy(), piece[:, 1:].copy(), np.zeros_like(piece[:, :-1], dtype=np.int32))
        for piece in pieces
    ]


def machine() -> str:
    """The processor's name and its cores."""
    model = next(
        (
            row.split(":")[1].strip()
            for row in Path("/proc/cpuinfo").read_text().splitlines()
            if row.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{model}, {os.cpu_count()} cores"
