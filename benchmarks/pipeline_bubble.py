"""The bubble of each pipeline schedule: recorded on two ranks of one thread, and simulated from the same durations.

    python benchmarks/pipeline_bubble.py [--json FILE] [--steps N]

Two ranks hold equal layers and run every schedule in turn, a step of each a round, so that a busy neighbour
meets all of them. Of each step the recorded bubble is set beside what the simulator finds from the step's means:
how long each stage's forward and backward take, what passes between two operations of a rank, and on the way to
the other. `ideal` leaves out what passes between operations. The table shows medians over the steps, of `apart` too:
a neighbour's burst in one step is in both of that step's bubbles.
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
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

RANKS, MICROBATCHES, ROWS, TOKENS = 2, 8, 2, 512
LAYERS, WIDTH, VOCAB = 8, 256, 256
WARM_UP_STEPS = 2


def main() -> None:
    arguments = _arguments()
    if arguments.out:
        run_rank(arguments.steps, arguments.out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        launch(arguments.steps, Path(scratch))
        own = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    print(
        f"{'schedule':26}{'recorded':>10}{'simulated':>11}{'apart':>8}{'ideal':>8}{'step':>10}{'mean F':>9}"
    )
    rows = []
    for schedule in own[0]:
        rows.append(compare(schedule, [rank[schedule] for rank in own]))
        print(line(rows[-1]))
    if arguments.json:
        result = {"machine": machine(), "date": date.today().isoformat(), "schedules": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def compare(schedule: str, ranks: list[Any]) -> dict[str, Any]:
    """Medians over the steps; `ranks` holds each rank's operations, step by step."""
    from muster.parallel.orders import orders
    from muster.parallel.schedules import SCHEDULES
    from muster.parallel.simulate import Operation, bubble_fraction, mean_delays, mean_duration_s, simulate

    plan = orders(
        schedule,
        ranks=RANKS,
        stages_per_rank=SCHEDULES[schedule].stages_per_rank,
        microbatches=MICROBATCHES,
    )
    recorded, simulated, ideal, spans_s, forwards_s = [], [], [], [], []
    for of_ranks in zip(*ranks, strict=True):
        step = [Operation(**operation) for own in of_ranks for operation in own]
        duration_s = mean_duration_s(step)
        recorded.append(bubble_fraction(step))
        simulated.append(bubble_fraction(simulate(plan, duration_s, mean_delays(step))))
        ideal.append(bubble_fraction(simulate(plan, duration_s)))
        spans_s.append(max(o.end_s for o in step) - min(o.start_s for o in step))
        forwards_s.append(statistics.mean(o.end_s - o.start_s for o in step if o.kind == "F"))
    medians = {"recorded": statistics.median(recorded), "simulated": statistics.median(simulated)}
    return {
        "schedule": schedule,
        **medians,
        "apart": abs(statistics.median(s / r - 1 for s, r in zip(simulated, recorded, strict=True))),
        "ideal": statistics.median(ideal),
        "step_s": statistics.median(spans_s),
        "forward_s": statistics.median(forwards_s),
    }


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['schedule']:26}{row['recorded']:10.2%}{row['simulated']:11.2%}{row['apart']:8.1%}"
        f"{row['ideal']:8.2%}"
        f"{row['step_s'] * 1000:8.0f}ms{row['forward_s'] * 1000:7.1f}ms"
    )


def launch(steps: int, scratch: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(Path(__file__).resolve()),
        "--steps", str(steps), "--out", str(scratch),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"a rank failed:\n{done.stderr[-3000:]}")


def run_rank(steps: int, out: Path) -> None:
    import torch

    from muster.parallel import world
    from muster.parallel.inputs import Inputs
    from muster.parallel.schedules import SCHEDULES

    with world.join() as joined:
        pipelines = {schedule: build(schedule, joined.rank) for schedule in SCHEDULES}
        seen: dict[str, list[Any]] = {schedule: [] for schedule in SCHEDULES}
        tokens = torch.randint(0, VOCAB, (MICROBATCHES * ROWS, TOKENS))
        for step in range(WARM_UP_STEPS + steps):
            for schedule, pipeline in pipelines.items():
                joined.barrier()
                with pipeline.recording() as operations:
                    pipeline.step(Inputs(tokens, tokens), loss_scale=1 / tokens.numel())
                if step >= WARM_UP_STEPS:
                    seen[schedule].append([asdict(operation) for operation in operations])
        (out / f"{joined.rank}.json").write_text(json.dumps(seen))


def build(schedule: str, rank: int) -> Any:
    import torch
    import torch.distributed as dist

    from muster.model.spec import TransformerSpec
    from muster.model.transformer import Transformer
    from muster.parallel.pipeline import Activations, Pipeline
    from muster.parallel.schedules import SCHEDULES, stages_of_rank
    from muster.parallel.stages import explicit

    spec = TransformerSpec(
        family="llama", layers=LAYERS, width=WIDTH, heads=4, kv_heads=2, head_dim=64, ffn=704, vocab=VOCAB,
        context=TOKENS, tied=False,
    )  # fmt: skip
    stages_per_rank = SCHEDULES[schedule].stages_per_rank
    stages = RANKS * stages_per_rank
    split = explicit([LAYERS // stages] * stages)
    modules = {
        index: Transformer(spec, split[index])
        for index in stages_of_rank(schedule, rank, RANKS, stages_per_rank)
    }
    for module in modules.values():
        module.init_weights(seed=1)
    group = dist.group.WORLD
    assert group is not None
    activations = Activations(width=WIDTH, dtype=torch.float32, device=torch.device("cpu"))
    return Pipeline(
        modules, schedule=schedule, microbatches=MICROBATCHES, rows=ROWS, tokens=TOKENS,
        activations=activations, group=group,
    )  # fmt: skip


def machine() -> str:
    names = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.processor()}, {os.cpu_count()} cores"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--steps", type=int, default=15, help="steps of each schedule")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
