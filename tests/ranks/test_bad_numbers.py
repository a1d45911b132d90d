"""Bad numbers on real ranks: a run that met a bad batch equals, bit for bit, one that never saw it; a flipped bit is
found on any layout that has a copy of it, and the rank and the tensor are named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from muster.chaos.within import spoil
from muster.checkpoint import manifest, shelf
from muster.observe.records import read_jsonl
from tests.ranks.test_resume import weights_of
from tests.toy import STEPS, tiny, train_here, write_corpus

LONG = pytest.mark.long
BAD = 3
"""The batch whose gradients are poisoned, or the step before which memory fails."""
MATRIX = "layers.1.mlp.up.weight"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def run_of(layout: dict[str, Any], every: int = 100, **faults: Any) -> dict[str, Any]:
    run = tiny(layout=layout, checkpoint={"every": f"{every} steps", "keep": 9}, faults=faults)
    run["train"] = run["train"] | {"eval_every": None}
    return run


def withdrawn_before(folder: Path, first: int, last: int) -> Path:
    """A run's folder in which the batches are withdrawn before its first step."""
    folder.mkdir()
    event = {"event": "batches-withdrawn", "first": first, "last": last}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "events.jsonl") if event["event"] == kind]


def assert_same_run(folder: Path, other: Path) -> None:
    ours, theirs = weights_of(folder), weights_of(other)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    guards = [manifest.read(shelf.folder_of(f / "checkpoints", STEPS)).guard for f in (folder, other)]
    assert guards[0] == guards[1]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, {}, marks=LONG),
        pytest.param(2, {"replicate": 2}, marks=LONG),
        pytest.param(2, {"shard": 2, "zero": 1}, marks=LONG),
        (2, {"shard": 2, "zero": 3}),
        pytest.param(2, {"tensor": 2}, marks=LONG),
        (2, {"pipeline": 2}),
    ],
    ids=str,
)
def test_a_run_with_a_bad_batch_equals_one_that_never_saw_it(
    ranks: int, layout: dict[str, Any], corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run = run_of(layout, on_nan="skip")
    clean = withdrawn_before(tmp_path / "clean", BAD, BAD)
    run_ranks(ranks, train_here, run, str(corpus), str(clean))
    run_ranks(ranks, train_poisoned, run, str(corpus), str(tmp_path / "bad"), ranks - 1)
    (event,) = events(tmp_path / "bad", "batches-withdrawn")
    assert (event["first"], event["last"], event["step"], event["back_to"]) == (BAD, BAD, BAD, BAD)
    where = (
        "ranks 0, 1" if layout == {"replicate": 2} else f"rank {ranks - 1}"
    )  # summed over replicas already
    assert f"step {BAD + 1}: " in event["message"]
    assert f"first in {MATRIX} on {where}" in event["message"]
    assert_same_run(tmp_path / "bad", clean)


def train_poisoned(run: dict[str, Any], base: str, folder: str, on: int) -> None:
    """The gradient of one matrix is nan on one rank whenever the batch is the bad one."""
    import os

    from muster.train import gradients, loop

    deal, measure, dealt = loop.microbatches, gradients.squared_norm, [0]

    def microbatches(sampler: Any, plan: Any, part: int, batch: int) -> Any:
        dealt[0] = batch
        return deal(sampler, plan, part, batch)

    def squared_norm(named: Any, *rest: Any) -> float:
        if dealt[0] == BAD and (int(os.environ["RANK"]) == on or "replicate" in run["layout"]):
            spoil(named, random.Random(0), MATRIX)
        return measure(named, *rest)

    loop.microbatches, gradients.squared_norm = microbatches, squared_norm
    train_here(run, base, folder)


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, {}, marks=LONG),
        (2, {"shard": 2, "zero": 3}),
        pytest.param(2, {"pipeline": 2}, marks=LONG),
    ],
    ids=str,
)
def test_bad_parameters_are_healed_by_going_back(
    ranks: int, layout: dict[str, Any], corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run = run_of(layout, every=2, checksum_every=None)
    clean = withdrawn_before(tmp_path / "clean", 2, 4)
    run_ranks(ranks, train_here, run, str(corpus), str(clean))
    run_ranks(ranks, train_on_failing_memory, run, str(corpus), str(tmp_path / "bad"), "nan", MATRIX)
    told = [(e["first"], e["last"], e["back_to"]) for e in events(tmp_path / "bad", "batches-withdrawn")]
    assert told == [(3, 3, 3), (2, 4, 2)]
    assert [event["step"] for event in events(tmp_path / "bad", "resumed")] == [2]
    assert_same_run(tmp_path / "bad", clean)


def train_on_failing_memory(
    run: dict[str, Any], base: str, folder: str, fault: str, name: str, on: int | None = None
) -> None:
    """Before one step, once, the last rank (or another) finds nan, or a flipped bit, in a parameter it holds."""
    import os

    from muster.train.trainee import Trainee

    honest, failed = Trainee.update, []
    last = int(os.environ["WORLD_SIZE"]) - 1

    def update(self: Any, step: int, *rest: Any, **more: Any) -> Any:
        if step == BAD and not failed and int(os.environ["RANK"]) == (last if on is None else on):
            tensors = {
                key.split(".", 1)[1]: tensor for key, tensor in self._own().items() if "weights." in key
            }
            victim = local(tensors[name]).view(-1)
            if fault == "nan":
                victim[0] = float("nan")
            else:
                victim.view(torch.int32)[0] ^= 1 << 12
        failed.append(1) if step == BAD else None
        return honest(self, step, *rest, **more)

    Trainee.update = update  # type: ignore[method-assign]
    train_here(run, base, folder)


def test_a_run_killed_after_a_withdrawal_leaves_the_batch_out_again(
    corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    """The checkpoint it resumes from is older than the withdrawal; only the events tell of it."""
    run = run_of({"replicate": 2}, every=2)
    clean = withdrawn_before(tmp_path / "clean", BAD, BAD)
    run_ranks(2, train_here, run, str(corpus), str(clean))
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(2, train_poisoned_and_die, run, str(corpus), str(tmp_path / "bad"))
    assert shelf.steps(tmp_path / "bad" / "checkpoints") == [2]
    run_ranks(2, train_here, run, str(corpus), str(tmp_path / "bad"))  # whose batch is sound this time
    assert_same_run(tmp_path / "bad", clean)


def train_poisoned_and_die(run: dict[str, Any], base: str, folder: str) -> None:
    import os
    import signal

    from muster.train import recovery

    honest = recovery.recover

    def recover(*arguments: Any) -> int:
        step = honest(*arguments)
        torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
        return step

    recovery.recover = recover
    train_poisoned(run, base, folder, 1)


def test_a_spike_is_skipped_where_the_run_file_says_so(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    run = run_of({}, on_spike="skip")
    run["train"] = run["train"] | {"tokens": 36 * 256, "log_every": 36}
    run_ranks(1, train_spiking, run, str(corpus), str(tmp_path / "bad"))
    (event,) = events(tmp_path / "bad", "batches-withdrawn")
    assert (event["fault"], event["first"], event["step"]) == ("spike", 34, 34)
    assert "gradient norm" in event["message"]


def train_spiking(run: dict[str, Any], base: str, folder: str) -> None:
    from muster.train import gradients, loop

    deal, measure, dealt = loop.microbatches, gradients.squared_norm, [0]

    def microbatches(sampler: Any, plan: Any, part: int, batch: int) -> Any:
        dealt[0] = batch
        return deal(sampler, plan, part, batch)

    def squared_norm(named: Any, *rest: Any) -> float:
        return measure(named, *rest) * (1e6 if dealt[0] == 34 else 1)

    loop.microbatches, gradients.squared_norm = microbatches, squared_norm
    train_here(run, base, folder)


@pytest.mark.parametrize(
    ("ranks", "layout", "name", "on", "said"),
    [
        (3, {"replicate": 3}, MATRIX, 1, rf"step 4: rank 1 holds other bits of weights\.{MATRIX} .*on ranks 0, 2"),
        pytest.param(
            2, {"replicate": 2}, MATRIX, 1, rf"step 4: ranks 0, 1 hold different bits of .*{MATRIX}", marks=LONG
        ),
        pytest.param(
            4, {"replicate": 2, "shard": 2, "zero": 3}, MATRIX, 3, rf"ranks 1, 3 hold .*{MATRIX}", marks=LONG
        ),
        (4, {"tensor": 4}, "norm.weight", 2, r"rank 2 holds other bits of weights\.norm\.weight .*on ranks 0, 1, 3"),
        (2, {"pipeline": 2}, "copy of embed.weight", 1, r"ranks 0, 1 hold different bits of weights\.embed\.weight"),
    ],
    ids=str,
)  # fmt: skip
def test_a_flipped_bit_is_found_and_named(
    ranks: int,
    layout: dict[str, Any],
    name: str,
    on: int,
    said: str,
    corpus: Path,
    run_ranks: Any,
    tmp_path: Path,
) -> None:
    run = run_of(layout, every=2, checksum_every=1)
    run["train"] = run["train"] | {"batch_tokens": 32 * 12, "tokens": STEPS * 32 * 12}
    run["model"] = run["model"] | {"kv_heads": 4}
    with pytest.raises(RuntimeError, match=said):
        run_ranks(ranks, train_on_failing_memory, run, str(corpus), str(tmp_path / "bad"), "flip", name, on)
    assert shelf.steps(tmp_path / "bad" / "checkpoints") == [2]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(4, {"replicate": 2, "tensor": 2}, marks=LONG),
        (4, {"tensor": 2, "pipeline": 2, "schedule": "zbv"}),
        pytest.param(4, {"replicate": 2, "context": 2, "zero": 0}, marks=LONG),
        pytest.param(2, {"replicate": 2, "compress": {"gradients": "int8"}}, marks=LONG),
        (2, {"replicate": 2, "compress": {"gradients": "powersgd"}}),
        pytest.param(2, {"tensor": 2, "sequence_parallel": False}, marks=LONG),
    ],
    ids=str,
)
def test_no_false_alarm_where_copies_are_kept_equal(
    ranks: int, layout: dict[str, Any], corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    run = run_of(layout, checksum_every=1)
    run["train"] = run["train"] | {"precision": "bf16"}
    run["model"] = run["model"] | {"layers": 4}
    run_ranks(ranks, train_here, run, str(corpus), str(tmp_path / "run"))
    assert events(tmp_path / "run", "finished")
