"""What would save memory: legal changes only, by the same formulas as the estimate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.config.schema import Layout as Said
from muster.model.build import spec_from_config
from muster.parallel.layout import resolve
from muster.parallel.savings import Saving, _said, needs, savings
from tests.toy import tiny


def found(layout: dict[str, Any], device: Any = "cpu") -> tuple[list[Saving], dict[str, int]]:
    """The savings, and the same differences from layouts written by hand."""
    run = load_resolved(tiny(layout=layout))
    spec = spec_from_config(run.model, 256, Path())
    now = resolve(run, spec, cores=2, gpus=0)
    said = savings(run, spec, now, sequence=32, device=device, cores=2, gpus=0)

    def total(changes: dict[str, Any]) -> int:
        other = load_resolved(tiny(layout=layout | changes))
        resolved = resolve(other, spec, cores=2, gpus=0)
        return needs(other, spec, resolved, sequence=32, device=device).total_bytes

    by_hand = {}
    for saving in said:
        pairs = [part.removeprefix("layout.").split("=") for part in saving.change.split()]
        changes = {key: int(value) if value.isdigit() else value for key, value in pairs}
        by_hand[saving.change] = total({}) - total(changes)
    return said, by_hand


@pytest.mark.parametrize(
    "layout",
    [
        {"microbatch": 4},
        {"shard": 2, "microbatch": 4},
        {"replicate": 2, "pipeline": 2},
        {"tensor": 2, "replicate": 2},
    ],
    ids=str,
)
def test_they_are_what_the_formulas_say_and_the_best_is_first(layout: dict[str, Any]) -> None:
    said, by_hand = found(layout)
    assert said
    assert [saving.saves_bytes for saving in said] == sorted((s.saves_bytes for s in said), reverse=True)
    for saving in said:
        if "offload" not in saving.change:
            assert saving.saves_bytes == by_hand[saving.change]


def test_the_changes_keep_the_ranks() -> None:
    said, _ = found({"replicate": 2, "microbatch": 4})
    changes = [saving.change for saving in said]
    assert "layout.replicate=1 layout.shard=2 layout.zero=3" in changes
    assert "layout.microbatch=2" in changes
    assert not any("zero=2" in change for change in changes)  # nothing is sharded


def test_offloading_is_for_where_memory_is_scarce() -> None:
    on_cpu, on_gpu = ([s.change for s in found({"microbatch": 1}, device)[0]] for device in ("cpu", "cuda"))
    assert "layout.offload=disk" in on_cpu
    assert "layout.offload=cpu" not in on_cpu
    assert "layout.offload=cpu" in on_gpu


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"shard": 2, "zero": 3, "recompute": "selective", "bucket": 2},
        {"pipeline": 2, "schedule": "interleaved", "microbatch": 1},
        {"context": 2, "context_kind": "ulysses", "shard": 2, "zero": 2},
        {"tensor": 2, "sequence_parallel": False},
    ],
    ids=str,
)
def test_a_resolved_layout_is_said_as_it_was_written(layout: dict[str, Any]) -> None:
    model = tiny()["model"] | {"layers": 4}
    run = load_resolved(tiny(layout=layout, model=model))
    spec = spec_from_config(run.model, 256, Path())
    now = resolve(run, spec, cores=2, gpus=0)
    assert isinstance(run.layout, Said)
    again = resolve(replace(run, layout=_said(now)), spec, cores=2, gpus=0)
    assert replace(again, reason="") == replace(now, reason="")
