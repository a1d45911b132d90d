"""Trials of a run's checkpoints against kills, crashes and flipped bits; tests run a few, `faults.py` many.

    python benchmarks/faults_checkpoint.py [--kills 200] [--flips 1000]

Each trial is a fresh process that saves one checkpoint after the other with the parts that training uses (shards of two
ranks, commit, retention). What is left must always hold a sound checkpoint, at least as new as the
last one that the process had said was complete.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muster.chaos.inject import flip_bit

RANKS = 2
_CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "close")
_LIMIT_S = 60.0


@dataclass
class Outcome:
    """Of a series of trials."""

    trials: int = 0
    unloadable: list[str] = field(default_factory=list)


def save_one(shelf_folder: Path, step: int, size: int = 30_000) -> None:
    """What the ranks do for one checkpoint, one after the other in this process; values follow from the step."""
    from muster.checkpoint import manifest, shelf
    from muster.checkpoint.snapshot import Snapshot
    from muster.checkpoint.state import collect_sums, write_file

    partial = shelf.begin(shelf_folder, step)
    for rank in range(RANKS):
        snapshot = Snapshot(state_of(step, rank, size), owns_whole=True)
        snapshot.take(state_of(step, rank, size), step)
        write_file(snapshot.pieces(), snapshot.arrangement.size_bytes, partial, rank)
    content = manifest.Manifest(
        format=manifest.FORMAT, step=step, tokens=step * 10, seed=0, digest="d", identity={}, layout={}, model={},
        versions={}, files=collect_sums(partial, RANKS),
    )  # fmt: skip
    shelf.commit(shelf_folder, step, content)
    shelf.retain(shelf_folder, keep=2)


def state_of(step: int, rank: int, size: int) -> dict[str, Any]:
    """Tensors whose every value says which step and rank they are of."""
    import torch

    return {
        f"weights.{rank}": torch.full((size,), float(step * RANKS + rank)),
        f"exp_avg.{rank}": torch.full((size // 10,), float(step), dtype=torch.bfloat16),
        f"count.{rank}": torch.tensor(step),
    }


def what_loads(shelf_folder: Path, size: int = 30_000) -> int:
    """The step that a restart would resume from, every value of it checked; 0 where nothing was ever saved."""
    import torch

    from muster.checkpoint import shelf
    from muster.checkpoint.state import read_shards

    shelf.sweep(shelf_folder)
    found = shelf.newest_sound(shelf_folder, on_damaged=_refuse)
    if found is None:
        return 0
    path, content = found
    for rank in range(RANKS):
        expected = state_of(content.step, rank, size)
        read = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        read_shards(read, path)
        for name in expected:
            if not torch.equal(read[name], expected[name]):
                raise AssertionError(f"{path}: {name} is not of step {content.step}")
    return content.step


def _refuse(what: str) -> None:
    raise AssertionError(f"a kill left a damaged checkpoint: {what}")


def crash_at_every_call(folder: Path) -> Outcome:
    """Save twice before, then die at the first, second, ... call of the system while saving a third time."""
    outcome = Outcome()
    prepared = folder / "prepared"
    _in_child(_prepare, prepared).join()
    for call in range(1, 10_000):
        trial = folder / f"crash-{call}"
        shutil.copytree(prepared, trial)
        child = _in_child(_crash, trial, call)
        child.join(_LIMIT_S)
        _judge(outcome, f"call {call}", trial, at_least=2)
        shutil.rmtree(trial)
        if child.exitcode == 0:  # it had fewer calls than that
            return outcome
    raise AssertionError("the save never ended")


def kill_at_random(folder: Path, trials: int, seed: int) -> Outcome:
    """kill -9 a process that saves without a pause, at random moments; it goes on in the same folder each time."""
    chance, outcome = random.Random(seed), Outcome()
    shelf_folder, progress = folder / "killed", folder / "progress"
    for number in range(trials):
        child = _in_child(_save_for_ever, shelf_folder, progress)
        deadline = time.monotonic() + _LIMIT_S
        while not progress.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.15))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(_LIMIT_S)
        said = int(progress.read_text() or 0) if progress.exists() else 0
        progress.unlink(missing_ok=True)
        _judge(outcome, f"kill {number}", shelf_folder, at_least=said)
    return outcome


def flip_bits(folder: Path, trials: int, seed: int, find: Callable[[Path], list[str]]) -> Outcome:
    """Flip one random bit of a random file under `folder` each time; `find` must name that file, and nothing else."""
    chance, outcome = random.Random(seed), Outcome()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(trials):
        victim = files[number % len(files)]
        honest = victim.read_bytes()
        where = flip_bit(victim, chance)
        said = find(folder)
        victim.write_bytes(honest)
        outcome.trials += 1
        if len(said) != 1 or str(victim) not in said[0]:
            outcome.unloadable.append(f"{victim} at byte {where}: {said}")
    if said := find(folder):
        outcome.unloadable.append(f"sound files are called damaged: {said}")
    return outcome


def _judge(outcome: Outcome, what: str, shelf_folder: Path, at_least: int) -> None:
    outcome.trials += 1
    try:
        step = what_loads(shelf_folder)
        if step < at_least:
            raise AssertionError(f"step {step} is left, but {at_least} was complete")
    except Exception as error:
        outcome.unloadable.append(f"{what}: {error}")


def _in_child(work: Callable[..., None], *arguments: Any) -> Any:
    child = multiprocessing.get_context("forkserver").Process(target=work, args=arguments, daemon=True)
    child.start()
    return child


def _prepare(shelf_folder: Path) -> None:
    for step in (1, 2):
        save_one(shelf_folder, step)


def _crash(shelf_folder: Path, call: int) -> None:
    left = call

    def deadly(honest: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return honest(*arguments, **more)

        return stand_in

    for name in _CALLS:
        setattr(os, name, deadly(getattr(os, name)))
    save_one(shelf_folder, 3)
    os._exit(0)


def _save_for_ever(shelf_folder: Path, progress: Path) -> None:
    from muster.checkpoint import shelf

    step = max(shelf.steps(shelf_folder), default=0)
    while True:
        step += 1
        save_one(shelf_folder, step)
        draft = progress.with_suffix(".draft")
        draft.write_text(str(step))
        draft.rename(progress)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=1000)
    arguments = parser.parse_args()
    from muster.cli._verify import damage

    multiprocessing.set_forkserver_preload(["muster.checkpoint.state", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        series = {
            "crash at every call": crash_at_every_call(folder),
            "kill -9 while saving": kill_at_random(folder, arguments.kills, seed=0),
            "bit flips": flip_bits(folder / "prepared" / "step-00000002", arguments.flips, 0, damage),
        }
    for name, outcome in series.items():
        print(f"{name:24}{outcome.trials:6} trials, {len(outcome.unloadable)} not survived")
        for line in outcome.unloadable[:5]:
            print(f"    {line}")
    sys.exit(any(outcome.unloadable for outcome in series.values()))


if __name__ == "__main__":
    main()
