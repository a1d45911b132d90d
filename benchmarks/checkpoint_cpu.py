"""What a checkpoint costs on this machine, beside DCP's `async_save` and beside raw safetensors.

    python benchmarks/checkpoint_cpu.py [--json FILE] [--rounds N] [--quick]

Two ranks train a 60 M model in fp32, sharded, 360 MB of state each. In each round they take a few steps without a
save, then after a save in the background by muster, after one whose bytes a process writes instead of a thread, and
after one by DCP: the same ranks, state and disk. Stall: how long the call that saves keeps training from going on,
and under muster also what the next update waits for the copy. Slow-down: by how much the steps meanwhile are longer,
in sum. Saves and loads that are waited for (page cache warm) stand beside `save_file` + fsync and `load_file` of the
same bytes, plus the time to hash them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cells

SIDES = ("muster", "process", "dcp")
STEPS = 3
"""Taken after each save."""
DUE = (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""What all ranks' votes sum to where a save is due, a copy for memory is not, and nothing is in flight."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--quick", action="store_true", help="one round of a small model: does it run")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds, shape = (1, "10M") if arguments.quick else (arguments.rounds, "60M")
    if arguments.rank is not None:
        measure(arguments.rank, shape, rounds)
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", __file__, "--rank", scratch,
            "--rounds", str(rounds), *(["--quick"] if arguments.quick else []),
        ]  # fmt: skip
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        figures = json.loads((Path(scratch) / "figures.json").read_text())
    print("\n".join(lines(figures)))
    if arguments.json:
        result = {"machine": cells.machine(), "date": date.today().isoformat(), "torch": version("torch")}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result | figures, indent=1) + "\n")


def lines(seen: dict[str, float]) -> list[str]:
    step = seen["step_s"]
    table = [
        f"state {seen['bytes'] / 1e6:.0f} MB a rank, step {step:.2f} s",
        f"{'':24}{'stall':>10}{'of a step':>11}{'slow-down':>11}{'on disk after':>15}",
    ]
    for side in SIDES:
        stall, slowdown, done = (seen[f"{side}_{what}_s"] for what in ("stall", "slowdown", "done"))
        table.append(
            f"{side:24}{stall * 1e3:7.0f} ms{stall / step:11.1%}{slowdown * 1e3:8.0f} ms{done:13.2f} s"
        )
    table.append(f"stall, muster over DCP  {seen['muster_stall_s'] / seen['dcp_stall_s']:10.2f}")
    for what in ("save", "load"):
        ours, raw, hashing = seen[f"{what}_s"], seen[f"raw_{what}_s"], seen["hash_s"]
        table.append(
            f"{what}, waited for: {ours:.2f} s; raw {raw:.2f} s + hash {hashing:.2f} s: {ours / (raw + hashing):.2f}x"
        )
    return table


class WriterProcess:
    """What muster might do instead: a process that hashes and writes the snapshot, out of memory that both see."""

    def __init__(self, state: Any, *, whole: bool) -> None:
        import mmap

        import torch

        from muster.checkpoint.manifest import write_summed
        from muster.checkpoint.snapshot import Snapshot

        self._snapshot = Snapshot(state, owns_whole=whole)
        size = self._snapshot.arrangement.size_bytes
        shared = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        self._snapshot.body.set_(shared)  # type: ignore[call-overload]
        self._snapshot._views = {
            shard.name: shared[shard.start : shard.start + shard.size_bytes]
            .view(shard.dtype)
            .view(shard.shape)
            for shard in self._snapshot.arrangement.shards
        }
        self._here, there = multiprocessing.Pipe()
        if os.fork() == 0:
            self._here.close()  # so that the end of the rank, however it comes, ends this as well
            with contextlib.suppress(EOFError):
                while path := there.recv_bytes().decode():
                    write_summed(Path(path), self._snapshot.pieces())
                    there.send_bytes(str(time.perf_counter()).encode())
            os._exit(0)

    def save(self, state: Any, folder: Path) -> None:
        self._snapshot.take(state, 0)
        self._begun = time.perf_counter()
        self._here.send_bytes(str(folder / f"process-{os.environ['RANK']}").encode())

    def wait(self) -> float:
        """Seconds from the copy to the disk."""
        return float(self._here.recv_bytes()) - self._begun

    def end(self) -> None:
        self._here.send_bytes(b"")
        os.wait()


class Records:
    """Where a saver tells what happened."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def note(self, kind: str, sentence: str, **fields: Any) -> None:
        self.events.append((kind, fields | {"message": sentence}))


def measure(folder: Path, shape: str, rounds: int) -> None:
    """One rank's part; the first leaves the figures in `folder`."""
    import torch.distributed as dist
    from torch.distributed.checkpoint import async_save

    from muster.parallel.world import join
    from muster.train.saves import Saver
    from muster.train.trainee import Trainee

    cell = cells.Cell(
        size=shape, precision="fp32", processes=2, threads=1, rows=cells.SHAPES[shape]["rows"], parts=2,
        layout={"shard": 2},
    )  # fmt: skip
    with join() as world:
        training = cells._training(cell, folder / "ours")
        trainee, records = Trainee(training, world), Records()
        saver = Saver(trainee, training, world, records, step=0)  # type: ignore[arg-type]
        group = dist.new_group(backend="gloo")  # DCP's thread must not speak on training's
        times: dict[str, list[float]] = {}
        done = 0

        def timed(what: str, work: Callable[[], Any]) -> Any:
            world.barrier()
            begun = time.perf_counter()
            result = work()
            times.setdefault(what, []).append(longest(time.perf_counter() - begun))
            return result

        def steps(side: str) -> None:
            nonlocal done
            for number in range(STEPS):
                saver.after(done, world.sum(*saver.votes(done)))
                batches = cells._batches(cell, trainee.mesh.data_index, number)
                timed(f"{side}_{number}", functools.partial(trainee.update, done, batches, cell.tokens))
                done += 1

        writer = WriterProcess(trainee.state(), whole=trainee.mesh.is_first_of_stage)
        steps("warm_up")
        for _ in range(rounds):
            steps("plain")
            saved = done
            timed("muster_stall", functools.partial(saver.after, saved, DUE))
            steps("muster")
            saver.finish(saved)  # which waits for it
            timed("process_stall", functools.partial(writer.save, trainee.state(), folder))
            steps("process")
            times.setdefault("process_done", []).append(writer.wait())
            begun = time.perf_counter()
            future = timed(
                "dcp_stall",
                lambda: async_save(trainee.state(), checkpoint_id=folder / "dcp", process_group=group),
            )
            ended: list[float] = []
            future.add_done_callback(lambda _, ended=ended: ended.append(time.perf_counter()))
            steps("dcp")
            future.result()
            times.setdefault("dcp_done", []).append(ended[0] - begun)
            world.barrier()
            if world.is_first:
                shutil.rmtree(folder / "dcp")
        writer.end()
        for number in range(rounds):
            compare_waited(timed, trainee, training, world, folder, number)
        if world.is_first:
            (folder / "figures.json").write_text(json.dumps(summary(times, records), indent=1))


def compare_waited(timed: Any, trainee: Any, training: Any, world: Any, folder: Path, number: int) -> None:
    """A save and a load that are waited for, and the same bytes in raw safetensors."""
    from safetensors.torch import load_file, save_file

    from muster.checkpoint.snapshot import arrange, local
    from muster.train.saves import Saver, resume

    records = Records()
    training = replace(training, folder=folder / "waited")
    saver = Saver(trainee, training, world, records, step=number)
    timed("save", lambda: saver.finish(number + 1))
    timed("load", lambda: resume(trainee, training, world, records))  # type: ignore[arg-type]
    state = trainee.state()
    owned = arrange(state, owns_whole=trainee.mesh.is_first_of_stage)
    tensors = {shard.name: local(state[shard.name]).detach().contiguous() for shard in owned.shards}
    path = folder / f"raw-{world.rank}-{number}.safetensors"

    def write() -> None:
        save_file(tensors, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())

    def digest() -> None:
        found = hashlib.sha256()
        for tensor in tensors.values():
            found.update(memoryview(tensor.numpy().reshape(-1)).cast("B"))

    def read() -> None:
        for name, tensor in load_file(path).items():
            tensors[name].copy_(tensor)

    timed("raw_save", write)
    timed("raw_load", read)
    timed("hash", digest)
    path.unlink()
    records.event("bytes", size=owned.size_bytes)


def longest(value: float) -> float:
    """Of the ranks' values."""
    import torch
    import torch.distributed as dist

    most = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def summary(times: dict[str, list[float]], records: Records) -> dict[str, float]:
    """Medians over the rounds."""
    middle = {what: statistics.median(taken) for what, taken in times.items()}
    step = statistics.median(middle[f"plain_{number}"] for number in range(STEPS))
    saves = [fields for kind, fields in records.events if kind == "checkpoint"]
    figures = {
        "step_s": step,
        "bytes": saves[0]["bytes"] / 2,
        "muster_done_s": statistics.median(fields["seconds"] for fields in saves),
        "dcp_done_s": middle["dcp_done"],
        "process_done_s": middle["process_done"],
    }
    middle["muster_stall"] = statistics.median(fields["stall_s"] for fields in saves)
    for side in SIDES:
        figures[f"{side}_stall_s"] = middle[f"{side}_stall"]
        figures[f"{side}_slowdown_s"] = sum(middle[f"{side}_{number}"] - step for number in range(STEPS))
    return figures | {f"{what}_s": middle[what] for what in ("save", "load", "raw_save", "raw_load", "hash")}


if __name__ == "__main__":
    main()
