"""Layouts are decided, and bad ones refused, before any process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.errors import ConfigError
from muster.model.build import spec_from_config
from muster.parallel.layout import Layout, resolve
from tests.toy import tiny


def decide(
    layout: Any = "auto", *, cores: int = 2, gpus: int = 0, ranks: int | None = None, **train: Any
) -> Layout:
    run = tiny(layout=layout)
    run["train"] = {"tokens": 100_000, "batch_tokens": 4096} | train
    resolved = load_resolved(run)
    spec = spec_from_config(resolved.model, 256, Path())
    return resolve(resolved, spec, cores=cores, gpus=gpus, ranks=ranks)


def test_auto_is_one_rank_a_core_and_says_why() -> None:
    layout = decide(cores=2)
    assert (layout.replicate, layout.shard, layout.zero) == (2, 1, 0)
    assert "measured" in layout.reason


def test_auto_takes_the_most_ranks_that_divide_the_batch() -> None:
    assert decide(cores=6, batch_tokens=32 * 8).world == 4
    assert decide(gpus=3, batch_tokens=32 * 8).world == 2


def test_auto_follows_ranks_that_were_started() -> None:
    assert decide(ranks=4).world == 4


def test_the_batch_is_shared_out_exactly() -> None:
    for ranks in (1, 2, 4, 8):
        layout = decide({"replicate": ranks})
        assert layout.microbatch * layout.accumulate * layout.world == 4096 // 32


@pytest.mark.parametrize(
    ("layout", "train", "message"),
    [
        ({"replicate": 3}, {}, r"3 ranks do not divide the batch of 128 sequences; use 2 or 4 ranks"),
        ({"microbatch": 5}, {}, r"layout\.microbatch: 5 does not divide the 128 sequences .* 4 or 8"),
        ("auto", {"batch_tokens": 4000 + 1}, r"train\.batch_tokens: 4001 is not a multiple .* 4000 and 4032"),
        ("auto", {"sequence": 64}, r"train\.sequence: 64 tokens exceed the model's context of 32"),
    ],
)
def test_refusals_name_the_nearest_legal_values(layout: Any, train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decide(layout, **train)


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 2 ranks, but 4 were started"):
        decide({"shard": 2}, ranks=4)
