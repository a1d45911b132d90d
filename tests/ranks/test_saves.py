"""Saving while training goes on: the state of one step, nothing harmed by a disk that refuses, what is kept."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from muster.checkpoint import manifest, shelf
from muster.observe.records import read_jsonl
from tests.toy import STEPS, tiny, train_here, write_corpus

LAYOUT = {"shard": 2, "zero": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "events.jsonl") if event["event"] == kind]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from muster.export.trained import load_trained

    return {name: parameter.detach() for name, parameter in load_trained(folder).model.named_parameters()}


def train_with_slow_disk(run: dict[str, Any], base: str, folder: str, steps_a_save: int) -> None:
    """Copies are made late, and files written only when `steps_a_save` more steps have been taken."""
    from muster.checkpoint.snapshot import Snapshot
    from muster.train import saves, trainee

    honest_take, honest_write = Snapshot.take, saves.write_file
    honest_update, done = trainee.Trainee.update, [0]

    def take(*arguments: Any) -> None:
        deadline = time.monotonic() + (1.0 if done[0] == 1 else 0.0)
        while done[0] == 1 and time.monotonic() < deadline:  # if the step that follows did not wait
            time.sleep(0.001)
        honest_take(*arguments)

    def write_file(*arguments: Any) -> None:
        begun = done[0]
        while done[0] < min(begun + steps_a_save, STEPS):
            time.sleep(0.001)
        honest_write(*arguments)

    def update(*arguments: Any, **more: Any) -> Any:
        result = honest_update(*arguments, **more)
        done[0] += 1
        return result

    Snapshot.take = take  # type: ignore[method-assign]
    saves.write_file = write_file
    trainee.Trainee.update = update  # type: ignore[method-assign]
    train_here(run, base, folder)


def test_what_is_saved_is_one_step_though_training_goes_on(
    corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    straight, slow = tmp_path / "straight", tmp_path / "slow"
    run = tiny(layout=LAYOUT, checkpoint={"every": "1 steps", "keep": 9})
    run_ranks(2, train_here, run, str(corpus), str(straight))
    run_ranks(2, train_with_slow_disk, run, str(corpus), str(slow), 2)
    # Step 1 is written when step 3 is done, so that what comes due at 2 and 3 has to wait.
    saved = shelf.steps(slow / "checkpoints")
    assert saved[0] == 1
    assert saved[-1] == STEPS
    assert 2 not in saved
    assert events(slow, "checkpoint-put-off")[0]["step"] == 2
    assert all(event["stall_s"] < event["seconds"] for event in events(slow, "checkpoint"))
    for step in saved[1:]:
        (slow / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"aside-{step}")
    run_ranks(2, train_here, run, str(corpus), str(slow))
    assert events(slow, "resumed")[-1]["step"] == 1
    expected, resumed = weights_of(straight), weights_of(slow)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def train_on_a_full_disk(run: dict[str, Any], base: str, folder: str, rank: int, lifted_after: int) -> None:
    """No file of this rank may grow beyond 20 kB, until `lifted_after` steps are done."""
    import os

    from muster.train import saves

    honest = saves.Saver.after
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == str(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))

    def after(saver: Any, step: int, votes: Any) -> None:
        honest(saver, step, votes)
        saver._work.wait()  # so that each due save has its turn in a run of six steps
        saver._world.barrier()
        if step == lifted_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    saves.Saver.after = after  # type: ignore[method-assign]
    train_here(run, base, folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_costs_neither_the_run_nor_the_checkpoint_before(
    rank: int, corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run = tiny(layout=LAYOUT, checkpoint={"every": "1 steps", "keep": 9})
    run_ranks(2, train_on_a_full_disk, run, str(corpus), str(tmp_path), rank, 4)
    failed = events(tmp_path, "checkpoint-failed")
    assert failed
    assert (
        "step 1 is not saved, the checkpoints before it are untouched: cannot write" in failed[0]["message"]
    )
    assert "File too large" in failed[0]["message"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in shelf.steps(tmp_path / "checkpoints")]
    assert shelf.steps(tmp_path / "checkpoints")[-1] == STEPS
    assert events(tmp_path, "finished")


def test_the_last_save_that_fails_is_an_error(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    run = tiny(layout=LAYOUT, checkpoint={"every": "100 steps"})
    with pytest.raises(
        RuntimeError, match=f"DoesNotFit: step {STEPS}, at which this run stops, is not saved: "
    ):
        run_ranks(2, train_on_a_full_disk, run, str(corpus), str(tmp_path), 1, 99)
    assert shelf.steps(tmp_path / "checkpoints") == []
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_made(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    run = tiny(layout=LAYOUT, checkpoint={"every": "2 steps"})
    with pytest.raises(RuntimeError, match="DoesNotFit: step"):
        run_ranks(2, train_here, run, str(corpus), str(tmp_path))
    assert [event["step"] for event in events(tmp_path, "checkpoint-failed")] == [2, 4, 6]


def test_without_memory_for_a_copy_the_state_itself_is_written(
    corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run = tiny(layout=LAYOUT | {"offload": "disk"}, checkpoint={"every": "1 steps", "keep": 9})
    run_ranks(2, train_here, run, str(corpus), str(tmp_path))
    assert "layout.offload: disk" in events(tmp_path, "checkpoint-foreground")[0]["message"]
    assert shelf.steps(tmp_path / "checkpoints")[-1] == STEPS
    for step in shelf.steps(tmp_path / "checkpoints"):
        manifest.verify(shelf.folder_of(tmp_path / "checkpoints", step))


def train_worse_and_worse(run: dict[str, Any], base: str, folder: str) -> None:
    """Evaluations find the state after step 2 the best."""
    from muster.train import saves

    honest = saves.Saver.scored

    def scored(saver: Any, step: int, evaluation: Any) -> None:
        worse = type(evaluation)(nats=1.0 + abs(step - 2), tokens=1, bytes=1)
        saver._work.wait()
        honest(saver, step, worse)

    saves.Saver.scored = scored  # type: ignore[method-assign]
    train_here(run, base, folder)


def test_the_best_is_saved_when_it_is_found_and_kept(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    run = tiny(layout=LAYOUT, checkpoint={"every": "5 steps", "keep": 1, "keep_best": True})
    run["train"] = run["train"] | {"eval_every": "2 steps"}
    run_ranks(2, train_worse_and_worse, run, str(corpus), str(tmp_path))
    folder = tmp_path / "checkpoints"
    assert shelf.steps(folder) == [2, STEPS]
    assert manifest.read(shelf.folder_of(folder, 2)).held_out_loss == 1.0
    assert shelf.best(folder, shelf.steps(folder)) == (2, 1.0)


def test_the_interval_is_found_from_what_saves_cost(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(1, train_here, tiny(checkpoint={"every": "auto"}), str(corpus), str(tmp_path))
    (said,) = events(tmp_path, "checkpoint-interval")
    assert "checkpoint.every: auto is" in said["message"]
    assert said["seconds"] > 0
