"""Bad numbers: what watching for them costs, and whether planted ones are found and named.

    python benchmarks/faults_numbers.py [--json FILE] [--trials N] [--quick]

Cost: two replicas train a 10M and a 60M model on one thread each; the time of a comparison of all copies (parameters
and both moments) is held against the time of the steps it is spread over. Trials: on small models and
several layouts, a nan in one element of one gradient on one rank, or one flipped bit of one parameter's copy
on one rank, place and step by the seed; found means that every rank raised in the same step and that the sentence has
the parameter and the rank (of two copies: both ranks).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import cells
import torch
from torch import Tensor

from muster.chaos.within import spoil
from muster.config import schema
from muster.config.load import load_resolved
from muster.errors import TrainingError
from muster.model.build import spec_from_config
from muster.parallel.catalogue import world_of
from muster.parallel.layout import resolve
from muster.parallel.world import World, join
from muster.resilience.forked import ForkedRanks
from muster.resilience.sniff import sniff
from muster.train import gradients
from muster.train.loop import microbatch_ranges
from muster.train.plan import Training
from muster.train.trainee import Trainee
from muster.train.verify import Case, batch_of, case, rows

TINY = {"family": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "context": 32, "tied": True}
POISONED: list[dict[str, Any]] = [
    {"replicate": 2}, {"shard": 2, "zero": 1}, {"shard": 2, "zero": 3}, {"tensor": 2}, {"pipeline": 2},
]  # fmt: skip
FLIPPED: list[dict[str, Any]] = [{"replicate": 3}, {"replicate": 2}, {"replicate": 2, "shard": 2, "zero": 3}]
LAST_STEP = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--trials", type=int, default=20, help="of each kind of fault")
    parser.add_argument("--quick", action="store_true", help="two trials and the small model only")
    arguments = parser.parse_args()
    trials = 2 if arguments.quick else arguments.trials
    result: dict[str, Any] = {"machine": cells.machine(), "date": date.today().isoformat(), "cost": []}
    with tempfile.TemporaryDirectory() as scratch:
        for size in ["10M"] if arguments.quick else list(cells.SHAPES):
            result["cost"].append(row := cost(size, Path(scratch)))
            print(line(row), flush=True)
        for kind in ("poison", "flip"):
            found = [trial(kind, seed, Path(scratch)) for seed in range(trials)]
            result[kind] = {"trials": trials, "found_and_named": sum(not missed for missed in found)}
            print(f"{kind}: {result[kind]['found_and_named']} of {trials} found and named")
            for missed in filter(None, found):
                print(f"  missed: {missed}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    step, check = (
        f"{row[f'{name}_s']:.4f} s (CPU {row[f'{name}_cpu_s']:.4f} s)" for name in ("step", "check")
    )
    return (
        f"{row['size']}: a step {step}, comparing {row['compared_bytes'] / 1e6:.0f} MB {check}: "
        f"{row['share']:.3%} of training every {row['every']} steps; "
        f"judging a step {row['judge_s'] * 1e6:.0f} us; sniff test {row['sniff_s']:.2f} s"
    )


def trial(kind: str, seed: int, scratch: Path) -> str | None:
    """One planted fault (`poison` or `flip`); None where it was found and named, else what went wrong."""
    draw = random.Random(f"{kind} {seed}")
    layout = draw.choice(POISONED if kind == "poison" else FLIPPED)
    out = scratch / "said.json"
    out.unlink(missing_ok=True)
    rank = draw.randrange(world_of(layout))
    work = (made(TINY, layout), kind, rank, seed, out)
    try:
        ForkedRanks().run(world_of(layout), plant, *work, errors=scratch / "errors", timeout_s=300)
    except TrainingError as error:
        return f"seed {seed}, {layout}: {error}"
    told = json.loads(out.read_text())
    holders = told["holders"]
    named = told["parameter"] in told["said"] and all(str(holder) in told["said"] for holder in holders)
    return None if named else f"seed {seed}, {layout}: {told}"


def plant(of: Case, kind: str, victim: int, seed: int, out: Path) -> None:
    """One rank's part of a trial; fails unless this rank raises in the step of the fault."""
    draw = random.Random(seed)
    fault_step = draw.randrange(LAST_STEP)
    with join() as world:
        trainee, training = start(of, world, out.parent)
        for step in range(fault_step):
            update(trainee, training, of, step)
        names = [name for name, p in trainee.model.named_parameters() if local(p).numel()]
        name = draw.choice(names)
        holders = [victim]
        if kind == "flip":
            update(trainee, training, of, fault_step)
            if world.rank == victim:
                parameter = dict(trainee.model.named_parameters())[name].detach()
                flip(local(parameter), draw)
            if of.run["layout"]["replicate"] == 2:  # the other copy of the part
                shards = of.run["layout"]["shard"]
                holders.append((victim + shards) % (2 * shards))
        else:
            poison(name, draw, only=world.rank == victim)
            if of.run["layout"]["replicate"] > 1:
                holders = list(range(world.size))
        try:
            if kind == "flip":
                trainee.check_copies(fault_step + 1)
            else:
                update(trainee, training, of, fault_step)
        except TrainingError as error:
            if world.rank == victim:
                out.write_text(json.dumps({"said": str(error), "parameter": name, "holders": holders}))
        else:
            raise AssertionError(f"rank {world.rank} noticed nothing")
        world.barrier()


def poison(name: str, draw: random.Random, *, only: bool) -> None:
    """A nan in this rank's part of a gradient before it is measured; under replicas, in all copies, as after a sum."""
    honest = gradients.squared_norm
    seed = draw.random()

    def squared_norm(named: gradients.Named, copies_apart: int = 1) -> float:
        parameter = dict(named).get(name)
        everywhere = parameter is not None and gradients._copies(parameter.grad) > 1
        if parameter is not None and (only or everywhere):
            spoil(named, random.Random(seed), name)
        return honest(named, copies_apart)

    gradients.squared_norm = squared_norm


def flip(tensor: Tensor, draw: random.Random) -> None:
    """One bit of one element."""
    flat = tensor.view(-1).view(torch.int32)
    flat[draw.randrange(len(flat))] ^= 1 << draw.randrange(31)


def cost(size: str, scratch: Path, steps: int = 3, every: int | None = None) -> dict[str, float]:
    """Seconds of a step, of a comparison, of a judgement and of the sniff test, medians on the first rank.

    Also the first two in seconds of the thread's own work, which a busy machine stretches less; the share is of those.
    """
    shape = dict(cells.SHAPES[size])
    rows_of, vocab = shape.pop("rows"), shape.pop("vocab")
    model = {"family": "llama", "tied": True, "context": cells.SEQUENCE, **shape}
    of = made(model, {"replicate": 2}, vocab=vocab, sequences=2 * rows_of)
    out = scratch / "cost.json"
    ForkedRanks().run(2, measure, of, steps, out, errors=scratch / "errors", timeout_s=600)
    told: dict[str, float] = json.loads(out.read_text())
    every = every or schema.Faults().checksum_every
    assert every is not None
    return {"size": size, "every": every, "share": told["check_cpu_s"] / told["step_cpu_s"] / every, **told}  # type: ignore[dict-item]


def measure(of: Case, steps: int, out: Path) -> None:
    torch.set_num_threads(1)
    with join() as world:
        trainee, training = start(of, world, out.parent)
        took: dict[str, list[float]] = {}
        work = {
            "step": lambda step: update(trainee, training, of, step),
            "check": lambda step: trainee.check_copies(step),
            "judge": lambda step: trainee.guard.judge(5.0, 1.0),
            "sniff": lambda step: sniff(torch.float32, world),
        }
        for _ in range(64):
            trainee.guard.applied(5.0, 1.0)
        for step in range(steps + 1):
            for name, one in work.items():
                world.barrier()
                began, work_began = time.perf_counter(), time.thread_time()
                one(step)
                if step:  # the first time, much is done once
                    took.setdefault(f"{name}_s", []).append(time.perf_counter() - began)
                    took.setdefault(f"{name}_cpu_s", []).append(time.thread_time() - work_began)
        if world.is_first:
            compared = sum(local(tensor).nbytes for tensor in trainee.state().values())
            told = {name: statistics.median(times) for name, times in took.items()}
            out.write_text(json.dumps(told | {"compared_bytes": compared}))


def made(model: dict[str, Any], layout: dict[str, Any], *, vocab: int = 101, sequences: int = 12) -> Case:
    run = load_resolved(
        {
            "name": "faults",
            "model": model,
            "data": {"train": [{"files": "*.txt"}]},
            "train": {"tokens": 1_000_000, "batch_tokens": 100_000},
        }
    )
    return case(run, spec_from_config(run.model, vocab, Path()), layout, LAST_STEP + 1, sequences)


def start(of: Case, world: World, folder: Path) -> tuple[Trainee, Training]:
    run = load_resolved(of.run)
    training = Training(
        run=run, folder=folder, spec=of.spec, model_folder=None, sequence=of.spec.context, steps=of.steps,
        layout=resolve(run, of.spec, cores=1, gpus=0, ranks=world.size),
    )  # fmt: skip
    return Trainee(training, world), training


def update(trainee: Trainee, training: Training, of: Case, step: int) -> None:
    whole = batch_of(of, step)
    ranges = microbatch_ranges(training, trainee.mesh.data_index, 0)
    trainee.update(min(step, of.steps - 1), [rows(whole, part) for part in ranges], whole.valid_tokens)


def local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main()
