"""Memory of a training step on this machine: what the formulas say, torch's own accounting, and the process's growth.

    python benchmarks/memory_cpu.py [--json FILE] [--only WORDS]

Each case runs in fresh processes. Activations, and everything together at its peak, are counted in tensors
(`muster.train.memory`); the growth of the resident set, from before the model is made to its peak, is a cross-check
that also has what allocators and kernels take. Figures are those of the rank that needs most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

SEQUENCE, SEQUENCES, VOCAB = 512, 4, 8192
DENSE: dict[str, Any] = {"family": "llama", "layers": 8, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 704}
SPARSE: dict[str, Any] = {
    "family": "mixtral", "layers": 4, "width": 256, "heads": 4, "kv_heads": 2, "experts": 8, "experts_per_token": 2,
    "expert_ffn": 352,
}  # fmt: skip
ONE = {"microbatch": 4}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    **{
        f"recompute {kind}, {precision}": (DENSE, precision, ONE | {"recompute": kind})
        for precision in ("fp32", "bf16")
        for kind in ("none", "selective", "full")
    },
    "zero 0 x 2": (DENSE, "bf16", {"replicate": 2, "zero": 0}),
    **{f"zero {zero} x 2": (DENSE, "bf16", {"shard": 2, "zero": zero}) for zero in (1, 2, 3)},
    "zero 3 x 4": (DENSE, "bf16", {"shard": 4, "zero": 3}),
    **{
        f"{kind} x {n}": (DENSE, "bf16", ONE | {"context": n, "context_kind": kind})
        for kind in ("ring", "ulysses")
        for n in (2, 4)
    },
    "tensor 2": (DENSE, "bf16", ONE | {"tensor": 2}),
    "tensor 2, no sequence": (DENSE, "bf16", ONE | {"tensor": 2, "sequence_parallel": False}),
    "1f1b x 2": (DENSE, "bf16", {"pipeline": 2, "microbatch": 1}),
    "gpipe x 2": (DENSE, "bf16", {"pipeline": 2, "schedule": "gpipe", "microbatch": 1}),
    "experts": (SPARSE, "bf16", ONE),
    "expert 2": (SPARSE, "bf16", {"shard": 2, "expert": 2}),
}


def main() -> None:
    arguments = _arguments()
    if arguments.case:
        run_rank(arguments.case, arguments.out)
        return
    rows = []
    print(f"{'case':24}{'ranks':>6}{'activations said':>18}{'counted':>10}{'ratio':>7}"
          f"{'total said':>13}{'counted':>10}{'ratio':>7}{'RSS growth':>12}")  # fmt: skip
    for name in CASES:
        if arguments.only in name:
            rows.append(launch(name))
            print(line(rows[-1]), flush=True)
    if arguments.json:
        result = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "versions": versions(),
            "cases": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    said, counted = row["said"], row["counted"]

    def pair(component: str) -> str:
        ours, theirs = said[component], counted[component]
        return f"{ours / 1e6:.1f} MB", f"{theirs / 1e6:.1f}", f"{ours / theirs:.3f}"

    a, b, c = pair("activations_bytes")
    d, e, f = pair("total_bytes")
    growth = f"{row['rss_growth_bytes'] / 1e6:.1f}"
    return f"{row['case']:24}{row['ranks']:6}{a:>18}{b:>10}{c:>7}{d:>13}{e:>10}{f:>7}{growth:>12}"


def launch(name: str) -> dict[str, Any]:
    """A case in processes of its own; the figures of the rank with the highest peak."""
    from muster.parallel.catalogue import world_of

    ranks = world_of(CASES[name][2])
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", __file__, "--case", name, "--out", scratch,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        found = [json.loads(path.read_text()) for path in Path(scratch).glob("*.json")]
    most: dict[str, Any] = max(found, key=lambda rank: rank["counted"]["total_bytes"])
    return {"case": name, "ranks": ranks} | most


def run_rank(name: str, folder: Path) -> None:
    """One rank of a case."""
    import resource

    import psutil

    from muster.parallel.world import join
    from muster.train.memory import expected, measure

    model, precision, layout = CASES[name]
    with join() as world:
        training = make_training(model, precision, layout, world.size)
        before = psutil.Process().memory_info().rss
        counted = measure(training, world, make_batches(training))
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        said = expected(training, world)
        figures = {
            "said": asdict(said) | {"total_bytes": said.total_bytes},
            "counted": asdict(counted),
            "rss_growth_bytes": growth,
        }
        (folder / f"{world.rank}.json").write_text(json.dumps(figures))


def make_training(model: dict[str, Any], precision: Any, layout: dict[str, Any], ranks: int) -> Any:
    from muster.config import schema
    from muster.model.build import spec_from_config
    from muster.parallel.layout import resolve
    from muster.train.plan import Training

    section = schema.Model(**model, context=SEQUENCE, tied=False)
    tokens = SEQUENCES * SEQUENCE
    run = schema.Run(
        name="bench", model=section, data=schema.Data(train=[schema.Source(files="*")]),
        train=schema.Train(tokens=tokens, batch_tokens=tokens, precision=precision), layout=schema.Layout(**layout),
    )  # fmt: skip
    spec = spec_from_config(section, VOCAB, Path())
    resolved = resolve(run, spec, cores=1, gpus=0, ranks=ranks)
    return Training(
        run=run,
        folder=Path(),
        spec=spec,
        layout=resolved,
        model_folder=None,
        sequence=SEQUENCE,
        steps=1,
    )


def make_batches(training: Any) -> list[Any]:
    """A rank's microbatches: random tokens, no borders between documents."""
    import numpy as np

    from muster.data.packing import Batch

    shape = (training.layout.microbatch, SEQUENCE)
    made = []
    for number in range(training.layout.accumulate):
        generator = np.random.default_rng(number)
        tokens, targets = (generator.integers(0, VOCAB, shape, dtype=np.int64) for _ in "ab")
        made.append(Batch(tokens, targets, np.zeros(shape, dtype=np.int32)))
    return made


def machine() -> str:
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(
        (row.split(":")[1].strip() for row in rows if row.startswith("model name")), platform.processor()
    )
    return f"{model}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "musterllm")} | {"python": platform.python_version()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
