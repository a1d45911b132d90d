"""A run that starts from the weights of another one: on any layout, from sound files only, with a fresh optimizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from muster.checkpoint import shelf
from muster.config.load import load_resolved
from muster.errors import ConfigError, UsageError
from muster.export.trained import load_trained
from muster.observe.records import read_jsonl
from muster.train import origin
from muster.train import plan as planning
from tests.toy import STEPS, tiny, train_here, write_corpus

EXPERTS = {
    "family": "dots1", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, "experts": 4,
    "experts_per_token": 2, "expert_ffn": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, run_ranks: Any) -> Path:
    """A corpus, and two finished runs: the tokenizer of the first is not bytes."""
    folder = tmp_path_factory.mktemp("base")
    write_corpus(folder)
    for name, changes in {
        "bpe": {"layout": {"shard": 2, "zero": 3}},
        "experts": {"layout": {"shard": 2, "expert": 2}, "model": EXPERTS},
    }.items():
        run = tiny(name=name, **changes)
        if name == "bpe":
            run["data"] = run["data"] | {"tokenizer": {"train": "bpe", "vocab": 280}}
        run_ranks(2, train_here, run, str(folder), str(folder / "runs" / name))
    return folder


def started(base: Path, at: str, **changes: Any) -> dict[str, Any]:
    return tiny(name="tuned", model={"from": at}, checkpoint={"every": "1 steps", "keep": 9}, **changes)


def first_state(run: dict[str, Any], base: str, folder: str) -> dict[str, Any]:
    """One rank: what training starts with, all of it put together by a save at step 0."""
    from muster.checkpoint.state import collect_sums, write_shards
    from muster.parallel.world import join
    from muster.train import saves
    from muster.train.report import Report
    from muster.train.trainee import Trainee

    with join() as world:
        plan = planning.make(
            load_resolved(run), base=Path(base), folder=Path(folder), gpus=0, ranks=world.size
        )
        Path(folder).mkdir(exist_ok=True)
        with Report(plan, world) as report:
            trainee = Trainee(plan, world)
            assert saves.resume(trainee, plan, world, report) == 0
            origin.begin(trainee, plan, world, report)
        saved = Path(folder) / "first"
        saved.mkdir(exist_ok=True)
        state = trainee.state() if trainee.mesh.is_first_copy else {}
        write_shards(state, saved, world.rank, owns_whole=trainee.mesh.is_first_of_stage)
        world.barrier()
        if world.is_first:
            collect_sums(saved, world.size)
        return {"vocab": plan.spec.vocab, "tokenizer": plan.corpus.tokenizer.vocab}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("bpe", {"tensor": 2}),
        ("bpe", {"pipeline": 2}),  # tied: the embedding is on both stages
        ("experts", {"context": 2, "expert": 2}),
        ("experts", {}),
    ],
    ids=str,
)
def test_another_layouts_weights_are_taken_bitwise(
    name: str, layout: dict[str, Any], base: Path, run_ranks: Any, tmp_path: Path
) -> None:
    from tests.ranks.test_resume_matrix import assembled

    ranks = 2 if layout else 1
    run = started(base, f"runs/{name}", layout=layout)
    seen = run_ranks(ranks, first_state, run, str(base), str(tmp_path / "tuned"))[0]
    assert seen["vocab"] == seen["tokenizer"] == (280 if name == "bpe" else 257)
    expected = load_trained(base / "runs" / name).model.state_dict()
    found = assembled(tmp_path / "tuned" / "first")
    weights = {
        key.removeprefix("weights."): value for key, value in found.items() if key.startswith("weights.")
    }
    assert weights.keys() >= {key for key, _ in load_trained(base / "runs" / name).model.named_parameters()}
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())
    assert all(not value.any() for key, value in found.items() if not key.startswith("weights."))


def test_a_checkpoint_is_taken_and_the_run_goes_its_own_way(
    base: Path, run_ranks: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "tuned"
    at = f"runs/bpe/checkpoints/step-{STEPS:08d}"
    run = started(base, at, layout={"tensor": 2})
    metrics = run_ranks(2, train_here, run, str(base), str(folder))[0]
    assert shelf.steps(folder / "checkpoints")[-1] == STEPS
    first = next(entry["loss"] for entry in metrics if "loss" in entry)
    trained = [
        entry["loss"] for entry in read_jsonl(base / "runs" / "bpe" / "metrics.jsonl") if "loss" in entry
    ]
    assert first < trained[0] - 0.1  # on the same batch: it starts where the other one ended
    notes = [entry.get("message", "") for entry in read_jsonl(folder / "events.jsonl")]
    assert sum("started from the weights of" in note for note in notes) == 1
    run_ranks(2, train_here, run, str(base), str(folder))  # resumed from its own checkpoint by now
    notes = [entry.get("message", "") for entry in read_jsonl(folder / "events.jsonl")]
    assert sum("started from the weights of" in note for note in notes) == 1


def test_what_cannot_be_started_from_is_refused(base: Path, tmp_path: Path) -> None:
    def plan(at: Path, **changes: Any) -> Any:
        run = load_resolved(started(base, str(at), **changes))
        return planning.make(run, base=base, folder=tmp_path / "tuned", gpus=0)

    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        plan(empty)
    data = tiny()["data"] | {"tokenizer": {"train": "bpe", "vocab": 290}}
    with pytest.raises(ConfigError, match="do not fit the model's vocabulary of 280"):
        plan(base / "runs" / "bpe", data=data)
    with pytest.raises(UsageError, match=r"no such file"):
        plan(tmp_path / "nowhere")


def test_damaged_files_are_not_started_from(base: Path, run_ranks: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base / "runs" / "bpe", copy)
    checkpoint = shelf.folder_of(copy / "checkpoints", STEPS)
    file = checkpoint / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)
    for number, at in enumerate((copy, checkpoint)):
        with pytest.raises(
            RuntimeError, match=r"rank-00000\.safetensors does not match|none of the 1 checkpoints"
        ):
            run_ranks(1, train_here, started(base, str(at)), str(base), str(tmp_path / f"tuned-{number}"))
        assert not shelf.steps(tmp_path / f"tuned-{number}" / "checkpoints")
    json.loads((checkpoint / "manifest.json").read_text())
    assert origin.read_spec(copy).vocab == 280
