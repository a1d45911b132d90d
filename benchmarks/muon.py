"""Seconds of one Muon step on sharded matrices, beside torch.optim.Muon on the same DTensors.

    python benchmarks/muon.py [--ranks 1 2 4] [--width E] [--layers L] [--repeats N] [--json FILE]

The matrices are those of Llama blocks; Newton-Schulz runs in bf16 in both, which give the same weights. The
two take turns, one thread a rank, and processor time of the first rank, which a neighbour on the machine
disturbs little, is shown as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from muster.config.schema import Optimizer
from muster.parallel.world import join
from muster.train.optimizer import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    results = [
        measure(ranks, arguments.width, arguments.layers, arguments.repeats) for ranks in arguments.ranks
    ]
    print(f"{'ranks':>5}  {'way':12}{'wall s':>9}{'cpu s':>9}   medians of {arguments.repeats}")
    for result in results:
        for way, times in result["times"].items():
            print(f"{result['ranks']:>5}  {way:12}{times['wall_s']:>9.3f}{times['cpu_s']:>9.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(ranks: int, width: int, layers: int, repeats: int) -> dict[str, Any]:
    """Median seconds of a step in each way, as the first of `ranks` sees it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    processes = [
        context.Process(target=run_rank, args=(rank, ranks, port, there, width, layers, repeats))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    times = here.recv()
    for process in processes:
        process.join()
    return {"ranks": ranks, "width": width, "layers": layers, "torch": torch.__version__, "times": times}


def run_rank(
    rank: int, ranks: int, port: int, pipe: Connection, width: int, layers: int, repeats: int
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    with join() as world:
        ours, theirs = (matrices(ranks, width, layers) for _ in range(2))
        muster = make_optimizer(ours, Optimizer(kind="muon"), compute=torch.bfloat16)
        reference = torch.optim.Muon(list(theirs.parameters()), adjust_lr_fn="match_rms_adamw")
        ways: dict[str, tuple[nn.Module, Callable[[], object]]] = {
            "muster": (ours, lambda: muster.step(1e-3)),
            "torch": (theirs, reference.step),
        }
        wall_s: dict[str, list[float]] = {way: [] for way in ways}
        cpu_s: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats + 1):
            for way, (model, step) in ways.items():
                for parameter in model.parameters():
                    parameter.grad = parameter.detach().clone()
                dist.barrier()
                started_s, started_cpu_s = time.perf_counter(), time.process_time()
                step()
                cpu_s[way].append(time.process_time() - started_cpu_s)
                dist.barrier()
                wall_s[way].append(time.perf_counter() - started_s)
        if world.is_first:  # the first step of each, which allocates, is left out
            pipe.send(
                {
                    way: {
                        "wall_s": statistics.median(wall_s[way][1:]),
                        "cpu_s": statistics.median(cpu_s[way][1:]),
                    }
                    for way in ways
                }
            )


def matrices(ranks: int, width: int, layers: int) -> nn.Module:
    """The matrices of `layers` Llama blocks, each rank with its rows."""
    mesh = init_device_mesh("cpu", (ranks,))
    shapes = {"q": (width, width), "o": (width, width), "k": (width // 2, width), "v": (width // 2, width)}
    shapes |= {"gate": (3 * width, width), "up": (3 * width, width), "down": (width, 3 * width)}
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleDict({str(layer): nn.Module() for layer in range(layers)})
    for block in model.layers.values():
        for name, shape in shapes.items():
            whole = 0.02 * torch.randn(shape)
            block.register_parameter(
                name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
            )
    return model


if __name__ == "__main__":
    main()
