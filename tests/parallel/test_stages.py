"""The split of layers over stages: cheapest costliest stage, contiguous, explicit ones checked."""

from __future__ import annotations

import itertools

import pytest

from muster.model.spec import TransformerSpec
from muster.parallel.stages import Costs, costs, explicit, split, split_problems

SPEC = TransformerSpec(
    family="llama",
    layers=6,
    width=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    vocab=1000,
    context=128,
    tied=False,
)


def test_costs_add_up_to_the_model() -> None:
    found = costs(SPEC, sequence=128)
    assert sum(found.layers) + found.head == pytest.approx(SPEC.flops_per_token(128))
    assert found.head > 6 * SPEC.vocab * SPEC.width > found.embedding > 0
    assert found.of(range(6)) == pytest.approx(found.embedding + sum(found.layers) + found.head)


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("head", [0.0, 2.5, 40.0])
def test_no_split_has_a_cheaper_costliest_stage(stages: int, head: float) -> None:
    parts = Costs(embedding=1.5, layers=(3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0), head=head)
    found = split(parts, stages)
    assert [layer for layers in found for layer in layers] == list(range(8))
    assert all(found)
    cuts = itertools.combinations(range(1, 8), stages - 1)
    every = [[range(a, b) for a, b in itertools.pairwise((0, *cut, 8))] for cut in cuts]
    assert max(map(parts.of, found)) == min(max(map(parts.of, ways)) for ways in every)


def test_the_stage_with_a_large_head_has_fewer_layers() -> None:
    parts = Costs(embedding=0.0, layers=(1.0,) * 12, head=2.5)
    assert [len(layers) for layers in split(parts, 4)] == [3, 4, 4, 1]


def test_among_equals_the_most_even() -> None:
    parts = Costs(embedding=0.0, layers=(1.0,) * 10, head=0.0)
    assert sorted(len(layers) for layers in split(parts, 4)) == [2, 2, 3, 3]


def test_explicit() -> None:
    assert explicit([3, 1, 2]) == [range(3), range(3, 4), range(4, 6)]
    assert split_problems(6, 3, [3, 1, 2]) == []


@pytest.mark.parametrize(
    ("layers", "stages", "said", "expected"),
    [
        (
            3,
            4,
            None,
            ["4 pipeline stages need at least 4 layers, but the model has 3: use 3 stages or fewer"],
        ),
        (6, 2, [3, 2, 1], ["names 3 stages, but the layout has 2"]),
        (6, 2, [6, 0], ["leaves a stage without layers"]),
        (6, 2, [3, 2], ["shares out 5 layers, but the model has 6"]),
        (6, 2, [3, 3, 1], ["names 3 stages", "shares out 7 layers"]),
    ],
)
def test_refused(layers: int, stages: int, said: list[int] | None, expected: list[str]) -> None:
    problems = split_problems(layers, stages, said)
    assert len(problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, problems, strict=True)), problems
