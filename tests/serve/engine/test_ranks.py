"""An engine over several ranks says what `transformers` says, however the model is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from muster.model.folder import open_weights, read_spec
from muster.parallel.world import join
from muster.serve.engine.core import Core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import pack_model
from muster.serve.engine.part import Part, load_part
from muster.serve.engine.ranks import Grid, Orders, ParallelNetwork, follow
from muster.serve.kernels.ops import choose_kernels
from tests.conftest import RunRanks
from tests.serve.engine.test_parity import WAYS, Case, case, run

__all__ = ["case"]

Answers = dict[str, tuple[list[list[int]], int, int]]
"""By way: tokens of each prompt, tokens found in the prefix cache, preemptions."""


def answer(folder: Path, tensor: int, pipeline: int, prompts: list[list[int]], ways: list[str]) -> Answers:
    """One rank's part; what the first one's engine says, each way."""
    with join():
        grid, orders = Grid(tensor, pipeline), Orders()
        part = Part.of(read_spec(folder), grid.rank, tensor=tensor, pipeline=pipeline)

        def load(folder: str) -> TransformerNetwork:
            model = load_part(part, open_weights(Path(folder)), dtype=torch.float32)
            packed = pack_model(model, "fp32", part=part)
            return TransformerNetwork(packed, choose_kernels(torch.float32)[0], grid.total)

        own, found = load(str(folder)), {}
        for way in ways:
            options: dict[str, Any] = {"block_tokens": 8, "step_tokens": 64, "streams": 5} | WAYS[way]
            block_tokens = options.pop("block_tokens")
            blocks = options.pop("blocks", 5 * -(-128 // block_tokens) + 1)
            cache = own.new_cache(blocks, block_tokens)
            if grid.rank:
                follow(own, cache, grid, orders, load)
                continue
            network = ParallelNetwork(own, grid, orders)
            context = min(128, (blocks - 1) * block_tokens)
            core = Core(network, cache, context_tokens=context, **options)
            tokens = run(core, prompts)
            network.end()
            found[way] = tokens, core.stats().prefix_hit_tokens, core.stats().preemptions
        return found


def check(case: Case, run_ranks: RunRanks, tensor: int, pipeline: int, ways: list[str]) -> None:
    found = run_ranks(tensor * pipeline, answer, case.folder, tensor, pipeline, case.prompts, ways)[0]
    for way, (tokens, hits, preemptions) in found.items():
        assert tokens == case.expected, way
        assert (hits > 0) == (way != "no prefix cache")
        assert (preemptions > 0) == (way == "preemption")


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_greedy_tokens_of_two_ranks_are_those_of_transformers(
    case: Case, run_ranks: RunRanks, tensor: int, pipeline: int
) -> None:
    check(case, run_ranks, tensor, pipeline, ["together", "chunks", "preemption"])


@pytest.mark.long
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2), (4, 1), (4, 2)])
def test_greedy_tokens_of_many_ranks_are_those_of_transformers(
    case: Case, run_ranks: RunRanks, tensor: int, pipeline: int
) -> None:
    check(case, run_ranks, tensor, pipeline, list(WAYS))
