"""Fewer ranks than the run file asks for: model axes stay, data axes shrink, the batch is the same."""

from __future__ import annotations

from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.model.build import spec_from_config
from muster.parallel.fit import fit, least
from muster.parallel.layout import Layout
from tests.toy import tiny


def fitted(ranks: int, layout: Any, **model: Any) -> Layout | None:
    from pathlib import Path

    content = tiny(layout=layout)
    content["model"] = content["model"] | model
    run = load_resolved(content)
    return fit(run, spec_from_config(run.model, 257, Path()), ranks, cores=2, gpus=0)


@pytest.mark.parametrize(
    ("ranks", "layout", "expected"),
    [
        (4, {"replicate": 4}, (4, 1)),
        (9, {"replicate": 4}, (4, 1)),  # never more than asked for
        (3, {"replicate": 4}, (2, 1)),  # 3 does not divide the batch of 8 sequences
        (7, {"replicate": 2, "shard": 4, "zero": 3}, (1, 4)),  # copies go first, so that memory stays
        (3, {"replicate": 2, "shard": 4, "zero": 3}, (1, 2)),
        (7, {"replicate": 4, "tensor": 2}, (2, 1)),
        (1, {"replicate": 4}, (1, 1)),
        (2, "auto", (2, 1)),
        (3, "auto", (2, 1)),
    ],
    ids=str,
)
def test_shrinks_to_what_fits(ranks: int, layout: Any, expected: tuple[int, int]) -> None:
    found = fitted(ranks, layout)
    assert found is not None
    assert (found.replicate, found.shard) == expected
    assert found.data * found.microbatch * found.accumulate == 8
    if isinstance(layout, dict):
        assert found.tensor == layout.get("tensor", 1)


def test_nothing_legal() -> None:
    layout = {"replicate": 2, "tensor": 2, "pipeline": 2, "microbatch": 1}
    run = load_resolved(tiny(layout=layout))
    assert fitted(3, layout) is None
    assert least(run.layout) == 4


def test_experts_stay_divided() -> None:
    sparse = {"family": "mixtral", "experts": 4, "experts_per_token": 2, "tied": False}
    found = fitted(3, {"shard": 4, "expert": 2}, **sparse)
    assert found is not None
    assert (found.shard, found.expert) == (2, 2)
    assert fitted(1, {"shard": 4, "expert": 2}, **sparse) is None
