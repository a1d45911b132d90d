"""A checkpoint of any layout is resumed on any other: every bit of the weights and of the optimizer's state arrives,
and training goes on as if nothing had happened. Random batches; `test_resume.py` resumes whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from muster.checkpoint.state import collect_sums, read_shards, write_shards
from muster.config.load import load_resolved
from muster.model.build import spec_from_config
from muster.parallel.catalogue import world_of
from muster.train.verify import Case, case
from tests.toy import tiny

STEPS = 4
SAVED_AFTER = 2
SIZES = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "context": 32}
DENSE = SIZES | {"family": "llama", "tied": False}
TIED = SIZES | {"family": "qwen2", "tied": True}
EXPERTS = SIZES | {"family": "mixtral", "experts": 4, "experts_per_token": 2, "expert_ffn": 32}
SHARED = SIZES | {"family": "dots1", "experts": 4, "experts_per_token": 2, "expert_ffn": 32}


def make(model: dict[str, Any], optimizer: str, layout: dict[str, Any]) -> Case:
    run = tiny(model=model)
    run["train"] = run["train"] | {"optimizer": {"kind": optimizer, "lr": 1e-3}}
    resolved = load_resolved(run)
    return case(resolved, spec_from_config(resolved.model, 101, Path()), layout, STEPS)


@pytest.mark.parametrize(
    ("model", "optimizer", "saved_on", "resumed_on"),
    [
        (TIED, "adamw", {"tensor": 2, "pipeline": 2, "schedule": "zbv"}, {"context": 2, "shard": 2, "zero": 3}),
        (DENSE, "muon", {"pipeline": 2, "context": 2}, {"tensor": 2, "pipeline": 2, "schedule": "interleaved"}),
        (TIED, "muon", {"pipeline": 4, "split": [1, 1, 1, 1]}, {"tensor": 4}),
        (EXPERTS, "adamw", {"shard": 2, "expert": 2, "tensor": 2}, {"context": 2, "shard": 2, "expert": 4}),
        (EXPERTS, "muon", {"context": 2, "expert": 2}, {"shard": 2, "expert": 2, "pipeline": 2, "schedule": "zbv"}),
        (SHARED, "adamw", {"tensor": 2, "sequence_parallel": False}, {"replicate": 2, "offload": "cpu"}),
    ],
    ids=str,
)  # fmt: skip
def test_every_bit_moves_to_another_layout(
    model: dict[str, Any],
    optimizer: str,
    saved_on: dict[str, Any],
    resumed_on: dict[str, Any],
    run_ranks: Any,
    tmp_path: Path,
) -> None:
    straight = run_ranks(world_of(saved_on), train, make(model, optimizer, saved_on), tmp_path, "straight")[0]
    moved = run_ranks(world_of(resumed_on), go_on, make(model, optimizer, resumed_on), tmp_path)[0]
    assert_equal(whole(tmp_path / "loaded"), whole(tmp_path / "saved"))
    assert moved == pytest.approx(straight[SAVED_AFTER:], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "optimizer", "layout"),
    [
        (TIED, "adamw", {"tensor": 2}),
        (TIED, "muon", {"pipeline": 2, "schedule": "zbv"}),
        (DENSE, "adamw", {"context": 2}),
        (EXPERTS, "adamw", {"shard": 2, "expert": 2}),
        (SHARED, "muon", {"shard": 2, "expert": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_resuming_on_the_same_layout_is_bitwise(
    model: dict[str, Any], optimizer: str, layout: dict[str, Any], run_ranks: Any, tmp_path: Path
) -> None:
    made, ranks = make(model, optimizer, layout), world_of(layout)
    straight = run_ranks(ranks, train, made, tmp_path, "straight")[0]
    assert run_ranks(ranks, go_on, made, tmp_path)[0] == straight[SAVED_AFTER:]
    assert_equal(whole(tmp_path / "resumed"), whole(tmp_path / "straight"))


def train(made: Case, folder: Path, end: str) -> list[float]:
    """One rank: all steps, saving in the middle and at the end; their losses."""

    def work(trainee: Any, update: Callable[[int], float], save: Callable[[str], None]) -> list[float]:
        losses = []
        for step in range(STEPS):
            losses.append(update(step))
            if step + 1 in (SAVED_AFTER, STEPS):
                save("saved" if step + 1 == SAVED_AFTER else end)
        return losses

    return _on_rank(made, folder, work)


def go_on(made: Case, folder: Path) -> list[float]:
    """One rank: continue from what `train` saved, keeping what was loaded and what it became."""

    def work(trainee: Any, update: Callable[[int], float], save: Callable[[str], None]) -> list[float]:
        trainee.restore(folder / "saved", SAVED_AFTER)
        save("loaded")
        losses = [update(step) for step in range(SAVED_AFTER, STEPS)]
        save("resumed")
        return losses

    return _on_rank(made, folder, work)


def _on_rank(made: Case, folder: Path, work: Callable[..., list[float]]) -> list[float]:
    from muster.parallel.layout import resolve
    from muster.parallel.world import join
    from muster.train.loop import microbatch_ranges
    from muster.train.plan import Training
    from muster.train.trainee import Trainee
    from muster.train.verify import batch_of, rows

    run = load_resolved(made.run)
    with join() as world:
        training = Training(
            run=run, folder=folder, spec=made.spec, model_folder=None, sequence=made.spec.context,
            layout=resolve(run, made.spec, cores=1, gpus=0, ranks=world.size), steps=STEPS,
        )  # fmt: skip
        trainee = Trainee(training, world)

        def update(step: int) -> float:
            whole = batch_of(made, step)
            ranges = microbatch_ranges(training, trainee.mesh.data_index, 0)
            return trainee.update(step, [rows(whole, part) for part in ranges], whole.valid_tokens).loss

        def save(name: str) -> None:
            (folder / name).mkdir(exist_ok=True)
            write_shards(
                trainee.state(), folder / name, world.rank, owns_whole=trainee.mesh.is_first_of_stage
            )
            world.barrier()
            if world.is_first:
                collect_sums(folder / name, world.size)

        return work(trainee, update, save)


def whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, put together."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    tensors = {
        name: torch.full(entry.size, torch.nan) for name, entry in metadata.state_dict_metadata.items()
    }  # type: ignore[union-attr]
    read_shards(tensors, folder)
    return tensors


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []
