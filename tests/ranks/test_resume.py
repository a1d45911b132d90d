"""Resuming: bit for bit on one layout, exact on another, from the newest sound checkpoint, never another run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muster.checkpoint import shelf
from muster.config.load import load_resolved
from muster.errors import UsageError
from muster.observe.records import read_jsonl
from tests.toy import STEPS, tiny, train_here, write_corpus

EVERY_STEP = {"every": "1 steps", "keep": 9}


class Stopped(Exception):
    """Stands for the power cut."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def train_and_stop(run: dict[str, Any], base: str, folder: str, after: int) -> None:
    """Train until `after` steps are done and saved, then end without another word."""
    from muster.train import saves

    honest = saves.Saver.after

    def save(saver: Any, step: int, votes: Any) -> None:
        honest(saver, step, votes)
        saver.finish(step)
        if step == after:
            raise Stopped

    saves.Saver.after = save  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train_here(run, base, folder)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from muster.export.trained import load_trained

    return {name: parameter.detach() for name, parameter in load_trained(folder).model.named_parameters()}


def ranks_of(layout: dict[str, int]) -> int:
    return layout.get("replicate", 1) * layout.get("shard", 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout", [{}, {"replicate": 2}, {"shard": 2, "zero": 3}, {"shard": 4, "zero": 2}], ids=str
)
def test_resuming_is_bitwise(
    layout: dict[str, int], precision: str, corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run = tiny(layout=layout, checkpoint=EVERY_STEP)
    run["train"] = run["train"] | {"precision": precision}
    ranks = ranks_of(layout)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_ranks(ranks, train_here, run, str(corpus), str(straight))
    run_ranks(ranks, train_and_stop, run, str(corpus), str(broken), STEPS // 2)
    assert shelf.steps(broken / "checkpoints")[-1] == STEPS // 2
    run_ranks(ranks, train_here, run, str(corpus), str(broken))
    expected, resumed = weights_of(straight), weights_of(broken)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        ({"shard": 2, "zero": 3}, {}),
        ({}, {"shard": 4, "zero": 3}),
        ({"replicate": 2}, {"shard": 4, "zero": 2}),
        ({"shard": 4, "zero": 1}, {"replicate": 2, "shard": 2, "zero": 3}),
    ],
    ids=str,
)
def test_resuming_on_another_layout(
    saved_on: dict[str, int], resumed_on: dict[str, int], corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run_ranks(1, train_here, tiny(layout={}), str(corpus), str(straight))
    first = tiny(layout=saved_on, checkpoint=EVERY_STEP)
    run_ranks(ranks_of(saved_on), train_and_stop, first, str(corpus), str(moved), STEPS // 2)
    saved = weights_of(moved)
    second = tiny(layout=resumed_on, checkpoint={"every": "100 steps"})
    loaded = run_ranks(ranks_of(resumed_on), whole_weights_after_loading, second, str(corpus), str(moved))[0]
    assert all(np.array_equal(saved[name].numpy(), loaded[name]) for name in saved)
    run_ranks(ranks_of(resumed_on), train_here, second, str(corpus), str(moved))
    losses = [
        [
            record["held_out_loss"]
            for record in read_jsonl(folder / "metrics.jsonl")
            if "held_out_loss" in record
        ][-1]
        for folder in (straight, moved)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def whole_weights_after_loading(run: dict[str, Any], base: str, folder: str) -> dict[str, np.ndarray]:
    from torch.distributed.tensor import DTensor

    from muster.parallel.world import join
    from muster.train import plan as planning
    from muster.train import saves
    from muster.train.report import Report
    from muster.train.trainee import Trainee

    with join() as world:
        plan = planning.make(
            load_resolved(run), base=Path(base), folder=Path(folder), gpus=0, ranks=world.size
        )
        trainee = Trainee(plan, world)
        with Report(plan, world) as report:
            assert saves.resume(trainee, plan, world, report) == STEPS // 2
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().numpy()
            for name, p in trainee.model.named_parameters()
        }


def test_a_damaged_checkpoint_is_named_and_the_one_before_resumed(
    corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run, folder = tiny(layout={"replicate": 2}, checkpoint=EVERY_STEP), tmp_path / "run"
    run_ranks(2, train_and_stop, run, str(corpus), str(folder), 3)
    victim = shelf.folder_of(folder / "checkpoints", 3) / "rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    run_ranks(2, train_here, run, str(corpus), str(folder))
    events = read_jsonl(folder / "events.jsonl")
    assert "step-00000003" in next(
        event["message"] for event in events if event["event"] == "checkpoint-damaged"
    )
    assert [event["step"] for event in events if event["event"] == "resumed"] == [2]
    assert events[-1]["event"] == "finished"


def test_a_folder_of_another_configuration_is_refused(corpus: Path, tmp_path: Path) -> None:
    from muster.train.entry import check

    folder = tmp_path / "tiny"
    check(load_resolved(tiny()), base=corpus, folder=folder)
    check(load_resolved(tiny(layout={"shard": 2})), base=corpus, folder=folder)  # the layout may change
    changed = tiny()
    changed["train"] = changed["train"] | {"optimizer": {"lr": 0.5}}
    with pytest.raises(UsageError, match=r"train\.optimizer\.lr: 0\.001 -> 0\.5"):
        check(load_resolved(changed), base=corpus, folder=folder)


def test_a_damaged_record_of_the_run_is_named(corpus: Path, tmp_path: Path) -> None:
    from muster.train.entry import check

    folder = tmp_path / "tiny"
    check(load_resolved(tiny()), base=corpus, folder=folder)
    record = folder / "run.json"
    record.write_bytes(record.read_bytes().replace(b"0.001", b"0.005"))
    with pytest.raises(UsageError, match=r"run\.json is damaged .* delete that file"):
        check(load_resolved(tiny()), base=corpus, folder=folder)


def test_poisoned_weights_stop_with_the_step_and_the_parameter(
    corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=r"step 3: .*not finite, first in layers\.1\.mlp\.up\.weight"):
        run_ranks(
            2,
            train_poisoned,
            tiny(layout={"shard": 2, "zero": 3}, faults={"on_nan": "stop"}),
            str(corpus),
            str(tmp_path / "tiny"),
        )
    assert read_jsonl(tmp_path / "tiny" / "events.jsonl")[-1]["event"] == "failed"


def train_poisoned(run: dict[str, Any], base: str, folder: str) -> None:
    """The gradient of one matrix becomes nan in the third step, on the second rank only."""
    import os

    from muster.train import gradients

    honest, calls = gradients.squared_norm, []

    def squared_norm(named: Any, *rest: Any) -> float:
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            dict(named)["layers.1.mlp.up.weight"].grad.to_local()[0, 0] = float("nan")
        return honest(named, *rest)

    gradients.squared_norm = squared_norm
    train_here(run, base, folder)
