from __future__ import annotations

from typing import Any

from muster.config.digest import differences, digest, identity
from muster.config.load import load_resolved
from muster.config.schema import Run


def run(**changes: Any) -> Run:
    plain: dict[str, Any] = {
        "name": "x",
        "model": {"family": "llama", "layers": 2, "width": 64, "heads": 4, "context": 32},
        "data": {"train": [{"files": "*.txt"}]},
        "train": {"tokens": 1000, "batch_tokens": 100},
    }
    return load_resolved(plain | changes)


def test_the_digest_is_that_of_the_resolved_run() -> None:
    written_out = run(layout="auto", train={"tokens": "1k", "batch_tokens": 100, "precision": "bf16"})
    assert digest(run()) == digest(written_out)
    assert digest(run()) != digest(run(name="y"))
    assert len(digest(run())) == 64


def test_identity_leaves_out_what_a_resumed_run_may_change() -> None:
    watched = {"tokens": 1000, "batch_tokens": 100, "log_every": 1, "eval_every": "5 steps", "eval_tokens": 7}
    changed = run(name="y", layout={"shard": 2}, checkpoint={"keep": 1}, track=["wandb"], train=watched)
    assert identity(changed) == identity(run())


def test_differences_name_the_key_and_both_values() -> None:
    train = {"tokens": 1000, "batch_tokens": 100, "optimizer": {"lr": 0.003, "clip": None}}
    data = {"train": [{"files": "*.md"}]}
    assert differences(identity(run()), identity(run(train=train, data=data))) == [
        'data.train.0.files: "*.txt" -> "*.md"',
        "train.optimizer.lr: 0.0003 -> 0.003",
        "train.optimizer.clip: 1.0 -> null",
    ]
    assert differences(identity(run()), identity(run())) == []


def test_differences_of_lists_of_other_lengths_and_new_keys() -> None:
    assert differences({"a": [1, 2]}, {"a": [1], "b": 3}) == ["a: [1, 2] -> [1]", "b: null -> 3"]
