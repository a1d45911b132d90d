"""Under every kind of parallelism, a real training step's traffic is attributed to the axes of its mesh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from muster.comm.meter import OTHER, Meter
from muster.comm.traffic import Traffic
from muster.data.packing import Batch
from muster.train.trainee import Trainee, Update
from tests.toy import STEPS, tiny, train_here, write_corpus

SPARSE = {"family": "mixtral", "experts": 4, "experts_per_token": 2}
GRADIENTS = {("shard", "all-gather"), ("shard", "reduce-scatter")}
SEQUENCE = {("tensor", "all-gather"), ("tensor", "reduce-scatter"), ("tensor", "all-reduce")}


@pytest.mark.parametrize(
    ("layout", "model", "expected"),
    [
        ({"tensor": 2, "shard": 2, "zero": 3}, {}, GRADIENTS | SEQUENCE),
        ({"tensor": 2, "pipeline": 2}, {}, SEQUENCE | {("pipeline", "send")}),
        (
            {"context": 2, "replicate": 2, "context_kind": "ulysses"},
            {},
            {("context", "all-to-all"), ("replicate", "all-reduce")},
        ),
        (
            {"replicate": 2, "shard": 2, "expert": 2, "zero": 3},
            SPARSE,
            GRADIENTS | {("expert", "all-to-all"), ("replicate", "all-reduce")},
        ),
    ],
)
def test_every_axis_is_seen(
    layout: dict[str, Any],
    model: dict[str, Any],
    expected: set[tuple[str, str]],
    run_ranks: Any,
    tmp_path: Path,
) -> None:
    write_corpus(tmp_path)
    run = tiny(layout=layout)
    run["model"] |= model
    traffics = run_ranks(4, metered, run, str(tmp_path), str(tmp_path / "out" / "tiny"))[0]
    assert len(traffics) == STEPS
    for traffic in traffics:
        assert expected <= set(traffic)
        others = sum(tally.payload_bytes for (axis, _), tally in traffic.items() if axis == OTHER)
        assert others < 200, (
            "sums of losses, norms and loads over the world, nothing that grows with the model"
        )


def metered(run: dict[str, Any], base: str, folder: str) -> list[Traffic]:
    traffics = []
    plain = Trainee.update

    def update(self: Trainee, step: int, batches: Sequence[Batch], tokens: int, **_: Any) -> Update:
        with Meter(self.mesh.groups) as meter:
            answer = plain(self, step, batches, tokens)
        traffics.append(meter.traffic)
        return answer

    Trainee.update = update  # type: ignore[method-assign]  # in this rank's process only
    train_here(run, base, folder)
    return traffics
