"""The parity matrix: every layout trains to the numbers of one process, for dense models and models with experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muster.config.load import load_resolved
from muster.errors import ConfigError
from muster.model.build import spec_from_config
from muster.parallel.catalogue import catalogue, world_of
from muster.train.verify import TOLERANCE, Case, case, compare, read_record, scaled, train_case
from tests.toy import tiny

STEPS = 3  # from the second on, moments and the schedule are in it
SIZES = {"layers": 2, "width": 64, "heads": 8, "context": 64}
EXPERTS = SIZES | {"kv_heads": 2, "experts": 8, "experts_per_token": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama, tied": SIZES | {"family": "llama", "kv_heads": 4, "tied": True},
    "mixtral": EXPERTS | {"family": "mixtral"},
    "gpt2": SIZES | {"family": "gpt2"},
    "qwen3": SIZES | {"family": "qwen3", "kv_heads": 2},
    "mistral": SIZES | {"family": "mistral", "kv_heads": 1, "window": 24},
    "qwen3_moe": EXPERTS | {"family": "qwen3_moe"},
    "dots1": EXPERTS | {"family": "dots1", "shared_ffn": 32, "expert_ffn": 32},
}
WHOLE = ("llama, tied", "mixtral")
"""Models that go through every layout; the others through one of each kind that treats their options differently."""
SOME = (
    "zero 3 x 2",
    "tensor 2",
    "tensor 4",
    "zbv x 2",
    "ring x 2",
    "expert x tensor",
    "zero 3 x context x tensor",
)


def cases() -> list[tuple[str, str]]:
    found = []
    for name, model in MODELS.items():
        layouts = catalogue(8, experts=model.get("experts", 0))
        found += [(name, layout) for layout in layouts if name in WHOLE or layout in SOME]
    return found


def make(name: str, layout: dict[str, Any]) -> Case:
    run = load_resolved(tiny(model=MODELS[name]))
    spec = scaled(spec_from_config(run.model, 509, Path()))
    return case(run, replace(spec, layers=2 * max(2, layout.get("pipeline", 1))), layout, STEPS)


@pytest.fixture(scope="module")
def references(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process's records, by model and number of layers."""
    made: dict[tuple[str, int], Any] = {}

    def reference(name: str, like: Case) -> Any:
        key = (name, like.spec.layers)
        if key not in made:
            folder = tmp_path_factory.mktemp("reference")
            alone = replace(make(name, {}), spec=like.spec)
            run_ranks(1, train_case, alone, folder)
            made[key] = read_record(alone, folder)
        return made[key]

    return reference


@pytest.mark.parametrize(("name", "layout"), cases())
def test_layout_trains_like_one_process(
    name: str, layout: str, references: Any, run_ranks: Any, tmp_path: Path
) -> None:
    degrees = catalogue(8, experts=MODELS[name].get("experts", 0))[layout]
    made = make(name, degrees)
    run_ranks(world_of(degrees), train_case, made, tmp_path)
    found = compare(read_record(made, tmp_path), references(name, made))
    assert found.ok, found


def test_the_matrix_is_whole() -> None:
    """What the README promises is in it, on at most 8 ranks."""
    for name in WHOLE:
        layouts = {layout for model, layout in cases() if model == name}
        for layout in layouts:
            make(name, catalogue(8, experts=MODELS[name].get("experts", 0))[layout])
        schedules = ("gpipe", "1f1b", "interleaved", "interleaved-zero-bubble", "zbv", "dualpipev")
        expected = {f"{schedule} x {n}" for schedule in schedules for n in (2, 4)}
        expected |= {f"{kind} x {n}" for kind in ("ulysses", "ring") for n in (2, 4)}
        expected |= {f"zero {zero} x {n}" for zero in (1, 2, 3) for n in (2, 4)} | {"hybrid 2 x 2"}
        expected |= {"tensor 2", "tensor 4", "tensor x pipeline x replicate", "context x tensor"}
        assert expected <= layouts


def test_a_skipped_reduction_is_caught(references: Any, run_ranks: Any, tmp_path: Path) -> None:
    made = make("llama, tied", {"replicate": 2})
    run_ranks(2, train_unsynced, made, tmp_path)
    found = compare(read_record(made, tmp_path), references("llama, tied", made))
    assert not found.ok
    assert found.weights > 100 * TOLERANCE
    assert found.first == "embed.weight"


def train_unsynced(made: Case, folder: Path) -> None:
    from muster.parallel import data

    honest = data.begin_microbatch
    data.begin_microbatch = lambda model, layout, *, is_last: honest(model, layout, is_last=False)
    train_case(made, folder)


def test_a_layout_that_cannot_be_is_refused_before_any_rank() -> None:
    with pytest.raises(ConfigError, match=r"layout\.expert: 4 ranks have no experts"):
        make("gpt2", {"shard": 4, "expert": 4})
