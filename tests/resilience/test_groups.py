"""Replica groups of real processes, killed with SIGKILL in a step: the run goes on as if nothing had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.errors import ConfigError
from muster.observe.records import read_jsonl
from muster.resilience.ledger import LEDGER
from muster.train.entry import check
from tests.resilience.perils import Peril, audit, train_groups
from tests.toy import tiny, train_here, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def elastic(steps: int, **layout: Any) -> dict[str, Any]:
    run = tiny(layout=layout, faults={"elastic": True}, checkpoint={"every": "4 steps"})
    run["train"] = run["train"] | {"tokens": steps * 256, "eval_every": "5 steps"}
    return run


def losses(folder: Path) -> dict[tuple[int, str], float]:
    return {
        (record["step"], name): record[name]
        for record in read_jsonl(folder / "metrics.jsonl")
        for name in ("loss", "held_out_loss", "gradient_norm")
        if name in record
    }


def same_as_undisturbed(
    run: dict[str, Any], corpus: Path, folder: Path, run_ranks: Any, perils: list[Peril]
) -> None:
    alone = run | {"layout": {}, "faults": {}}
    run_ranks(1, train_here, alone, str(corpus), str(folder / "alone"))
    expected, found = losses(folder / "alone"), losses(folder / "groups")
    # A leader that dies between a step and its report takes the figures with it.
    unheard = {step for _, step, moment in perils if moment in ("voted", "apply")}
    assert {step for step, _ in expected.keys() - found.keys()} <= unheard
    assert [found[key] for key in found] == pytest.approx([expected[key] for key in found], rel=1e-5)


def test_killed_at_every_moment_of_a_step(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    """Three groups; 8 sequences a step, which neither two nor three groups divide evenly into microbatches of one."""
    perils: list[Peril] = [
        (1, 2, "forward"),
        (2, 4, "reduce"),
        (0, 6, "vote"),
        (1, 8, "voted"),
        (2, 10, "apply"),
        (0, 12, "forward"),
    ]
    run = elastic(14, replicate=3, microbatch=1)
    run["train"] = run["train"] | {"batch_tokens": 288, "tokens": 288 * 14}
    train_groups(run, corpus, tmp_path / "groups", perils=perils)
    audit(tmp_path / "groups", 14, 9, perils)
    same_as_undisturbed(run, corpus, tmp_path, run_ranks, perils)


@pytest.mark.parametrize(
    "layout",
    [
        {"shard": 2, "zero": 3},
        {"pipeline": 2, "schedule": "1f1b", "microbatch": 1},
        pytest.param({"tensor": 2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_groups_of_two_ranks(layout: dict[str, Any], corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    perils: list[Peril] = [(1, 2, "reduce"), (0, 4, "forward")]
    run = elastic(6, replicate=2, **layout)
    train_groups(run, corpus, tmp_path / "groups", perils=perils)
    audit(tmp_path / "groups", 6, 8, perils)
    same_as_undisturbed(run, corpus, tmp_path, run_ranks, perils)


@pytest.mark.parametrize("kind", ["diloco", pytest.param("local_sgd", marks=pytest.mark.long)])
def test_groups_that_train_apart(kind: str, corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    """As plain copies do; and with a death in the middle of a round, which the others finish without that group."""
    run = elastic(15, replicate=2)
    run["train"] = run["train"] | {"sync": {"kind": kind, "every": 3}, "eval_every": "3 steps"}
    run_ranks(2, train_here, run | {"faults": {}}, str(corpus), str(tmp_path / "plain"))
    train_groups(run, corpus, tmp_path / "groups")
    expected, found = (
        {key: value for key, value in losses(tmp_path / name).items() if key[1] == "held_out_loss"}
        for name in ("plain", "groups")
    )
    assert expected == pytest.approx(found, rel=1e-5)
    # Who comes back takes part from the next meeting on.
    perils: list[Peril] = [(1, 2, "forward"), (0, 8, "forward")]
    train_groups(run, corpus, tmp_path / "killed", perils=perils)
    taken = [set(line["samples"]) for line in read_jsonl(tmp_path / "killed" / LEDGER)]
    assert taken == [{"0"}, {"0"}, {"1"}, {"1"}, {"0", "1"}]
    spans = read_jsonl(tmp_path / "killed" / LEDGER)[-1]["samples"]["0"]
    assert sum(stop - start for start, stop in spans) == 3 * 4
    met = [r for r in read_jsonl(tmp_path / "killed" / "sums.jsonl") if r["step"] == 15]
    assert len({record["group"] for record in met}) == 2
    assert len({record["sum"] for record in met}) == 1


@pytest.mark.parametrize(
    ("sync", "said"),
    [
        ({"kind": "delayed"}, "train.sync.kind: delayed"),
        ({"kind": "diloco", "every": 4, "fragments": 2}, "train.sync.fragments: 2"),
        ({"kind": "diloco", "every": 3, "compress": "int8"}, "train.sync.compress: int8"),
    ],
)
def test_how_groups_cannot_train_apart(sync: dict[str, Any], said: str) -> None:
    run = elastic(6, replicate=2)
    run["train"] = run["train"] | {"sync": sync}
    with pytest.raises(ConfigError, match=said):
        load_resolved(run)


@pytest.mark.parametrize(
    ("faults", "layout", "said"),
    [
        ({}, {"shard": 2}, "write layout: {replicate: 2} or more"),
        ({}, {"replicate": 2, "compress": {"gradients": "bf16"}}, "no effect between them"),
        (
            {},
            {"replicate": 3, "pipeline": 2, "schedule": "interleaved", "microbatch": 1},
            "with 2 of 3 groups alive, one would have 9 of the 18 microbatches",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_process(
    faults: dict[str, Any], layout: dict[str, Any], said: str, corpus: Path, tmp_path: Path
) -> None:
    run = tiny(layout=layout, faults={"elastic": True} | faults)
    run["model"] = run["model"] | {"layers": 4}
    run["train"] = run["train"] | {"batch_tokens": 18 * 32}
    with pytest.raises(ConfigError) as caught:
        check(load_resolved(run), base=corpus, folder=tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()
