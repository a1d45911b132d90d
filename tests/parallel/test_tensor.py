"""The table of tensor parallelism knows every parameter of every family, and nothing else."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import get_args

import pytest

from muster.config import schema
from muster.model.build import spec_from_config
from muster.model.transformer import parameter_names
from muster.parallel.tensor_plan import PLAN, plan_of
from muster.parallel.vocabulary import parts

FAMILIES = get_args(schema.Family)
SPARSE_FAMILIES = schema.SPARSE


SIZES = {"layers": 1, "width": 64, "heads": 4, "context": 32}
SPARSE = SIZES | {"experts": 4, "experts_per_token": 2}


def all_names() -> set[str]:
    """The parameters of every family."""
    models = [
        schema.Model(family=name, **(SPARSE if name in SPARSE_FAMILIES else SIZES)) for name in FAMILIES
    ]
    return {name for model in models for name in parameter_names(spec_from_config(model, 258, Path()))}


def test_every_parameter_has_an_entry() -> None:
    for name in all_names():
        plan_of(name)


def test_every_entry_is_of_some_parameter() -> None:
    used = {next(pattern for pattern in PLAN if fnmatch.fnmatchcase(name, pattern)) for name in all_names()}
    assert used == set(PLAN)


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(LookupError, match=r"no entry for layers\.0\.attention\.gate\.weight"):
        plan_of("layers.0.attention.gate.weight")


@pytest.mark.parametrize(("vocab", "ranks"), [(512, 4), (509, 4), (5, 4)])
def test_the_vocabulary_is_divided_whole(vocab: int, ranks: int) -> None:
    assert [token for part in parts(vocab, ranks) for token in part] == list(range(vocab))
    assert max(map(len, parts(vocab, ranks))) == -(-vocab // ranks)
