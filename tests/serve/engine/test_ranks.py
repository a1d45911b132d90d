"""An engine over several ranks says what `transformers` says, however the model is divided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muster.model.config_json import read_spec
from muster.model.folder import save_folder
from muster.model.transformer import Transformer
from muster.parallel.world import join
from muster.serve.engine.core import Core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.part import Part
from muster.serve.engine.ranks import Grid, Kind, Orders, ParallelNetwork, follow
from muster.serve.kernels.packing import Format
from muster.serve.weights import load_network
from tests.conftest import RunRanks
from tests.serve.engine.test_parity import NEW, WAYS, Case, case, run
from tests.serve.kernels.ragged import ragged

__all__ = ["case"]

Answers = dict[str, tuple[list[list[int]], int, int]]
"""By way: tokens of each prompt, tokens found in the prefix cache, preemptions."""


def answer(folder: Path, tensor: int, pipeline: int, prompts: list[list[int]], ways: list[str]) -> Answers:
    """One rank's part; what the first one's engine says, each way."""
    with join():
        grid, orders = Grid(tensor, pipeline), Orders()
        part = Part.of(read_spec(folder), grid.rank, tensor=tensor, pipeline=pipeline)

        def load(folder: str) -> TransformerNetwork:
            return load_network(Path(folder), "fp32", part, grid.total)

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


@pytest.mark.parametrize("case", ["llama", "qwen3", "dots1", "gpt2"], indirect=True)
def test_greedy_tokens_of_two_tensor_ranks_are_those_of_transformers(case: Case, run_ranks: RunRanks) -> None:
    """With few blocks, so that prompts come in chunks, share what they begin with, and are preempted."""
    check(case, run_ranks, 2, 1, ["preemption"])


@pytest.mark.parametrize("case", ["qwen2", "gpt2"], indirect=True)
def test_greedy_tokens_of_two_stages_are_those_of_transformers(case: Case, run_ranks: RunRanks) -> None:
    """A table that both stages hold, and one of positions that the first one does."""
    check(case, run_ranks, 1, 2, ["preemption"])


@pytest.mark.long
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_greedy_tokens_are_those_of_transformers_in_every_way(
    case: Case, run_ranks: RunRanks, tensor: int, pipeline: int
) -> None:
    check(case, run_ranks, tensor, pipeline, list(WAYS))


def renewed(old: Path, new: Path, prompts: list[list[int]]) -> list[list[list[int]]]:
    """What two ranks say: with the old weights, after one of them found none of the new, and with the new."""
    with join():
        grid, orders = Grid(2, 1), Orders()
        part = Part.of(read_spec(old), grid.rank, tensor=2)

        def load(folder: str) -> TransformerNetwork:
            return load_network(Path(folder), "fp32", part, grid.total)

        own = load(str(old))
        cache = own.new_cache(80, 8)
        if grid.rank:
            follow(own, cache, grid, orders, load)
            return []
        network = ParallelNetwork(own, grid, orders)
        core = Core(network, cache, context_tokens=128, streams=4, step_tokens=64)
        found = [run(core, prompts)]
        network.load(str(old.parent / "deleted meanwhile"))
        assert not network.renew(own)
        found.append(run(core, prompts))
        network.load(str(new))
        assert network.renew(load(str(new)))
        core.renew(network, salt="new", weights_step=2)
        found.append(run(core, prompts))
        network.end()
        return found


def test_ranks_take_new_weights_together_or_not_at_all(
    make_model: Callable[..., Transformer], tmp_path: Path, run_ranks: RunRanks, reference: Any
) -> None:
    models = [make_model(vocab=131, context=128, spread=spread) for spread in (6.0, 8.0)]
    folders = [save(model, tmp_path / str(index)) for index, model in enumerate(models)]
    prompts = [[1, 2, 3], list(range(40)), list(range(43))]
    before, after = ([reference(model, prompt, NEW) for prompt in prompts] for model in models)
    assert before != after
    assert run_ranks(2, renewed, *folders, prompts)[0] == [before, before, after]


FORMATS: list[Format] = ["bf16", "int8", "int4"]


def logits(folder: Path, tensor: int, format: Format, tokens: torch.Tensor) -> np.ndarray:
    """Of a text on some ranks."""
    grid = Grid(tensor, 1)
    part = Part.of(read_spec(folder), grid.rank, tensor=tensor)
    network = load_network(folder, format, part, grid.total)
    table = torch.arange(-(-len(tokens) // 8))[None]
    batch = ragged([tokens], [len(tokens)], table, 8)
    made = grid.compute(network, batch, network.new_cache(table.numel(), 8), Kind.LOGITS)
    return np.empty(0) if made is None else made.numpy()


def all_logits(folder: Path, tensor: int, tokens: list[int]) -> list[np.ndarray]:
    with join():
        return [logits(folder, tensor, format, torch.tensor(tokens)) for format in FORMATS]


def test_divided_weights_are_rounded_no_worse_than_whole_ones(
    make_model: Callable[..., Transformer], tmp_path: Path, run_ranks: RunRanks
) -> None:
    """Each rank's own scales, and sums of rounded parts."""
    model = make_model(vocab=131, context=64, width=64, head_dim=32, ffn=128, spread=3.0)
    tokens = list(range(50))
    with torch.inference_mode():
        exact = model(torch.tensor([tokens]))[0].numpy()
    folder = save(model, tmp_path / "model")
    (alone,), divided = (run_ranks(n, all_logits, folder, n, tokens) for n in (1, 2))
    for one, two in zip(alone, divided[0], strict=True):
        assert 0 < np.abs(two - exact).mean() < 1.3 * np.abs(one - exact).mean()


def save(model: Transformer, folder: Path) -> Path:
    weights = dict(model.named_parameters())
    save_folder(weights, model.spec, folder, dtype=torch.float32, bos_id=0, eos_id=0)
    return folder
