"""Keys and values in int8: near to what floats give, and the same however the engine comes to a token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from muster.model.config_json import read_spec
from muster.parallel.world import join
from muster.serve.engine.core import Core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import pack_model
from muster.serve.engine.part import Part
from muster.serve.engine.ranks import Grid, Orders, ParallelNetwork, follow
from muster.serve.kernels.ops import choose_kernels
from muster.serve.kernels.reference import Reference
from muster.serve.weights import load_network
from tests.conftest import RunRanks
from tests.serve.engine.test_parity import WAYS, Case, case, run
from tests.serve.kernels.ragged import ragged

__all__ = ["case"]


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3", "gpt2"], indirect=True)
def test_every_way_to_a_token_gives_the_same(case: Case, make_core: Callable[..., Core]) -> None:
    """Shared, copied and wiped blocks, prompts in chunks, and sequences that were computed again."""
    found = {}
    for way, options in WAYS.items():
        core = make_core(case.model, kv="int8", **({"streams": 5} | options))
        found[way] = run(core, case.prompts)
        assert (core.stats().preemptions > 0) == (way == "preemption")
        assert (core.stats().prefix_hit_tokens > 0) == (way != "no prefix cache")
    assert all(tokens == found["together"] for tokens in found.values())
    same = sum(
        a == b
        for one, two in zip(found["together"], case.expected, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert same > 0.5 * sum(map(len, case.expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3", "gpt2"], indirect=True)
def test_logits_are_near(case: Case, dtype: torch.dtype) -> None:
    """Within some hundredths of those that floats give; nearer still in C++ to torch, and not the same as of floats."""
    tokens = torch.randint(3, 131, (90,), generator=torch.Generator().manual_seed(0))
    packed = pack_model(case.model, "fp32" if dtype == torch.float32 else "bf16")
    batch = ragged([tokens], [90], torch.arange(12)[None], 8)
    native, reference = choose_kernels(dtype)[0], Reference(dtype)
    found = []
    for kernels, kv in ((native, None), (native, "int8"), (reference, "int8")):
        network = TransformerNetwork(packed, kernels)
        found.append(network.logits(batch, network.new_cache(12, 8, kv)))
    floats, int8, in_torch = found
    assert 0 < float((int8 - floats).norm() / floats.norm()) < 0.1
    assert float((int8 - in_torch).norm() / in_torch.norm()) < (1e-2 if dtype == torch.float32 else 0.1)


def divided(folder: Path, prompts: list[list[int]], tensor: int, pipeline: int) -> list[list[int]]:
    """One rank's part; what the first one's engine says."""
    with join():
        grid, orders = Grid(tensor, pipeline), Orders()
        part = Part.of(read_spec(folder), grid.rank, tensor=tensor, pipeline=pipeline)
        own = load_network(folder, "fp32", part, grid.total)
        cache = own.new_cache(14, 6, "int8")
        if grid.rank:
            follow(own, cache, grid, orders, lambda _: own)
            return []
        network = ParallelNetwork(own, grid, orders)
        core = Core(network, cache, context_tokens=78, streams=5, step_tokens=24)
        found = run(core, prompts)
        network.end()
        assert core.stats().preemptions
        return found


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_over_ranks(
    case: Case, make_core: Callable[..., Core], run_ranks: RunRanks, tensor: int, pipeline: int
) -> None:
    alone = run(make_core(case.model, kv="int8"), case.prompts)
    assert run_ranks(tensor * pipeline, divided, case.folder, case.prompts, tensor, pipeline)[0] == alone
