"""With an adapter, greedy tokens are those of PEFT and of merged weights, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from muster.model.config_json import read_spec
from muster.model.folder import load_folder
from muster.model.transformer import Transformer
from muster.parallel.world import join
from muster.serve.engine.core import Core
from muster.serve.engine.drafters import ModelDrafter
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import pack_model
from muster.serve.engine.part import Part
from muster.serve.engine.ranks import Grid, Orders, ParallelNetwork, follow
from muster.serve.kernels.ops import Kernels, choose_kernels
from muster.serve.kernels.packing import Format
from muster.serve.kernels.reference import Reference
from muster.serve.protocol import EngineError, Request, SamplingParams
from muster.serve.weights import load_network
from tests.conftest import RunRanks
from tests.serve.engine.adapting import ADAPTERS, Adapted, adapted, answers
from tests.serve.engine.test_parity import WAYS
from tests.serve.kernels.ragged import ragged


@pytest.fixture(scope="module", params=ADAPTERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted(request.param, Path(tmp_path_factory.mktemp(request.param)))


def core_of(case: Adapted, *, format: Format = "fp32", reference: bool = False, **options: Any) -> Core:
    model = load_folder(case.folder)
    compute = torch.float32 if format == "fp32" else torch.bfloat16
    kernels = Reference(compute) if reference else choose_kernels(compute)[0]
    network = TransformerNetwork(pack_model(model, format), kernels, adapters=case.read(model.spec))
    settings: dict[str, Any] = {"streams": 5, "step_tokens": 64, "block_tokens": 8, "blocks": 200} | options
    block_tokens, blocks = settings.pop("block_tokens"), settings.pop("blocks")
    context = min(128, (blocks - 1) * block_tokens)
    cache = network.new_cache(blocks, block_tokens)
    return Core(network, cache, context_tokens=context, adapters=list(case.adapters), **settings)


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_peft(case: Adapted, way: str) -> None:
    options = WAYS[way] | (
        {"blocks": 16} if way == "preemption" else {"blocks": 2000} if way == "small blocks" else {}
    )
    core = core_of(case, **options)
    assert answers(core, case) == case.expected
    assert (core.stats().preemptions > 0) == (way == "preemption")
    assert len({str(tokens) for tokens in case.expected.values()}) == len(case.adapters) + 1


def test_torch_alone_says_the_same(case: Adapted) -> None:
    assert answers(core_of(case, reference=True), case) == case.expected


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted("llama", Path(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_a_request_says_the_same_alone_and_among_others(llama: Adapted, format: Format) -> None:
    found = [answers(core_of(llama, format=format), llama, together=together) for together in (True, False)]
    assert found[0] == found[1]
    assert len({str(tokens) for tokens in found[0].values()}) == len(found[0])


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_an_adapter_on_rounded_weights_is_no_worse_than_merged_ones_rounded(
    llama: Adapted, format: Format
) -> None:
    """The distance from merged weights in fp32; and C++ and torch alone come to the same."""
    tokens = torch.randint(3, 131, (60,), generator=torch.Generator().manual_seed(0))
    model = load_folder(llama.folder)
    adapters = llama.read(model.spec)
    dtype = torch.float32 if format == "fp32" else torch.bfloat16

    def logits(model: Transformer, format: Format, kernels: Kernels, adapter: int = 0) -> torch.Tensor:
        network = TransformerNetwork(pack_model(model, format), kernels, adapters=adapters)
        batch = ragged([tokens], [60], torch.arange(8)[None], 8)
        batch = replace(batch, adapted=torch.tensor([[adapter, 0, 60]]))
        return network.logits(batch, network.new_cache(8, 8))

    native, _ = choose_kernels(dtype)
    for number, adapter in enumerate(adapters, 1):
        merged = load_folder(llama.folder)
        with torch.no_grad():
            for name, (a, b) in adapter.pairs.items():
                merged.get_parameter(name).add_(b @ a)
            exact = merged(tokens[None])[0]
        added = logits(model, format, native, number)
        distance, of_merged = (float((one - exact).norm()) for one in (added, logits(merged, format, native)))
        assert 0 < distance < 1.3 * of_merged, (adapter.name, distance, of_merged)
        in_torch = logits(model, format, Reference(dtype), number)
        assert float((added - in_torch).norm() / in_torch.norm()) < 0.1


def test_blocks_are_shared_within_an_adapter_only(llama: Adapted) -> None:
    core = core_of(llama)
    prompt = tuple(llama.prompts[2])

    def hits(adapter: str) -> int:
        before = core.stats().prefix_hit_tokens
        core.add(Request(id="1", prompt=prompt, params=SamplingParams(max_tokens=1), adapter=adapter))
        while core.busy:
            core.step()
        return core.stats().prefix_hit_tokens - before

    assert [hits(name) for name in ("", "all", "some", "last")] == [0, 0, 0, 0]
    assert [hits(name) for name in ("", "all", "some", "last")] == [len(prompt) - 1] * 4


def test_guesses_of_the_model_alone_change_no_token(llama: Adapted) -> None:
    network, _ = TransformerNetwork.of(load_folder(llama.folder), "fp32")
    drafter = ModelDrafter(network, network.new_cache(200, 8), step_tokens=64)
    core = core_of(llama, drafter=drafter, always_draft=True)
    assert answers(core, llama) == llama.expected
    assert core.stats().draft_tokens > core.stats().accepted_tokens > 0


def test_new_weights_keep_the_adapters_apart(llama: Adapted) -> None:
    """Taken up in the middle: those that run go on with theirs, and share nothing with another's."""
    core = core_of(llama)
    model = load_folder(llama.folder)
    same = TransformerNetwork(
        pack_model(model, "fp32"), choose_kernels(torch.float32)[0], adapters=llama.read(model.spec)
    )
    steps = core.step
    count = 0

    def renewing() -> Any:
        nonlocal count
        count += 1
        if count == 9:
            core.renew(same, salt="new", weights_step=2)
        return steps()

    core.step = renewing  # type: ignore[method-assign]
    assert answers(core, llama) == llama.expected
    assert core.stats().preemptions > 0


def test_an_unknown_adapter_fails_its_request_alone(llama: Adapted) -> None:
    core = core_of(llama)
    core.add(Request(id="1", prompt=(1,), params=SamplingParams(max_tokens=1), adapter="other"))
    ((_, error),) = core.step().items
    assert isinstance(error, EngineError)
    assert str(error) == "no adapter is called 'other'"
    assert answers(core, llama) == llama.expected


def divided(case: Adapted, tensor: int, pipeline: int) -> dict[str, list[list[int]]]:
    """One rank's part; what the first one's engine says."""
    with join():
        grid, orders = Grid(tensor, pipeline), Orders()
        part = Part.of(read_spec(case.folder), grid.rank, tensor=tensor, pipeline=pipeline)
        own = load_network(case.folder, "fp32", part, grid.total, adapters=case.adapters)
        cache = own.new_cache(60, 8)
        if grid.rank:
            follow(own, cache, grid, orders, lambda _: own)
            return {}
        network = ParallelNetwork(own, grid, orders)
        core = Core(
            network, cache, context_tokens=128, adapters=list(case.adapters), streams=5, step_tokens=40
        )
        found = answers(core, case)
        network.end()
        return found


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_greedy_tokens_over_ranks_are_those_of_peft(
    llama: Adapted, run_ranks: RunRanks, tensor: int, pipeline: int
) -> None:
    assert run_ranks(tensor * pipeline, divided, llama, tensor, pipeline)[0] == llama.expected


@pytest.mark.long
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_every_family_over_ranks(case: Adapted, run_ranks: RunRanks, tensor: int, pipeline: int) -> None:
    assert run_ranks(tensor * pipeline, divided, case, tensor, pipeline)[0] == case.expected
