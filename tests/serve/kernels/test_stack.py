"""All layers in one call are the same bits as one operation after the other, and are what serving computes with."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from muster.serve.engine.batch import Batch, PagedCache
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import PackedModel, pack_model
from muster.serve.engine.part import Part, load_part
from muster.serve.kernels.native import Native
from muster.serve.kernels.packing import Format
from muster.serve.kernels.shape import KV, Heads, Trunk
from tests.serve.kernels.ragged import ragged, random_table
from tests.serve.kernels.test_network import BLOCK_TOKENS, SCHEDULE, model_of, stepwise

COMPUTED: list[tuple[Format, torch.dtype]] = [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.float32), ("int8", torch.bfloat16),
    ("int4", torch.float32), ("int4", torch.bfloat16),
]  # fmt: skip


class OneByOne(Native):
    """Without a stack."""

    def stack(self, trunk: Trunk) -> None:
        return None


class Counted(Native):
    """Counts how often attention is called for by itself."""

    attended = 0

    def attend(self, qkv: Tensor, heads: Heads, batch: Batch, keys: Tensor, values: Tensor) -> Tensor:
        self.attended += 1
        return super().attend(qkv, heads, batch, keys, values)


def computing_in(packed: PackedModel, compute: torch.dtype) -> PackedModel:
    """The same weights for activations of another type."""
    tensors = {
        name: tensor.to(compute) if name in ("embed", "positions") else tensor
        for name, tensor in packed.tensors.items()
    }
    return replace(packed, compute=compute, tensors=tensors)


@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize(("format", "compute"), COMPUTED)
@pytest.mark.parametrize("case", ["llama-tied-bias", "llama-3.1-rope", "mistral-window", "qwen2", "qwen3"])
def test_the_same_bits(
    case: str, format: Format, compute: torch.dtype, kv: KV | None, tmp_path: Path, library: ctypes.CDLL
) -> None:
    packed = computing_in(pack_model(model_of(case, tmp_path), format), compute)
    tokens = torch.randint(3, 131, (3, 60))
    found: list[tuple[Tensor, PagedCache]] = []
    counted = Counted(library, compute)
    for kernels in (counted, OneByOne(library, compute)):
        network = TransformerNetwork(packed, kernels)
        torch.manual_seed(1)  # of the tables
        cache = network.new_cache(3 * 60 // BLOCK_TOKENS, BLOCK_TOKENS, kv)
        found.append((stepwise(network, tokens, SCHEDULE, cache), cache))
    (logits, cache), (expected, other) = found
    assert counted.attended == 0
    assert logits.isfinite().all()
    assert torch.equal(logits, expected)
    for pages, theirs in zip(cache.keys + cache.values, other.keys + other.values, strict=True):
        assert torch.equal(pages.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("threads", [1, 3])
def test_more_rows_and_positions_than_before(threads: int, tmp_path: Path, library: ctypes.CDLL) -> None:
    """What lies between operations is kept from call to call, and grows; so do the angles of positions."""
    packed = pack_model(model_of("llama", tmp_path), "int8")
    table = random_table(1, 1400, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for kernels in (Native(library, torch.bfloat16), OneByOne(library, torch.bfloat16)):
            network = TransformerNetwork(packed, kernels)
            cache = network.new_cache(table.numel(), 16)
            parts = []
            for start, end in ((0, 1), (1, 40), (40, 41), (41, 600), (600, 601), (601, 1400)):
                tokens = torch.arange(end) % 131
                known = table[:, : -(-end // 16)].contiguous()
                parts.append(network.logits(ragged([tokens], [end - start], known, 16), cache))
            results.append(torch.cat(parts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("case", ["gpt2", "mixtral", "dots1"])
def test_other_layers_have_no_stack(case: str, tmp_path: Path, library: ctypes.CDLL) -> None:
    model = model_of(case, tmp_path)
    kernels = Counted(library, torch.float32)
    network = TransformerNetwork(pack_model(model, "fp32"), kernels)
    stepwise(network, torch.randint(3, 131, (3, 60)), SCHEDULE[:1])
    assert kernels.attended == model.spec.layers


def test_stages_have_stacks_and_shares_of_layers_have_none(tmp_path: Path, library: ctypes.CDLL) -> None:
    model = model_of("llama", tmp_path)
    table = random_table(1, 20, BLOCK_TOKENS)
    batch = ragged([torch.arange(3, 15)], (12,), table, BLOCK_TOKENS)
    for tensor, pipeline, attended in ((1, 2, 0), (2, 1, model.spec.layers)):
        kernels = Counted(library, torch.float32)
        part = Part.of(model.spec, tensor=tensor, pipeline=pipeline)
        mine = load_part(part, lambda name, shape: model.get_parameter(name), dtype=torch.float32)
        network = TransformerNetwork(pack_model(mine, "fp32", part=part), kernels)
        x = torch.randn(12, model.spec.width)
        network.through(batch, network.new_cache(table.numel(), BLOCK_TOKENS), x)
        assert kernels.attended == attended


def test_what_does_not_fit_is_refused(tmp_path: Path, library: ctypes.CDLL) -> None:
    packed = pack_model(model_of("llama", tmp_path), "fp32")
    network = TransformerNetwork(packed, Native(library, torch.float32))
    table = random_table(1, 20, BLOCK_TOKENS)
    batch = ragged([torch.arange(3, 15)], (12,), table, BLOCK_TOKENS)
    cache = network.new_cache(table.numel(), BLOCK_TOKENS)
    x = torch.randn(12, network.spec.width)
    network.through(batch, cache, x.clone())
    for wrong in (x.bfloat16(), x[:, 1:], x[:11], x.t().contiguous().t()):
        with pytest.raises(TypeError):
            network.through(batch, cache, wrong)
    halves = tuple(pages.bfloat16() for pages in cache.keys)
    with pytest.raises(TypeError, match="pages"):
        network.through(batch, PagedCache(keys=halves, values=halves), x.clone())
    with pytest.raises(TypeError, match="pages"):
        network.through(batch, PagedCache(keys=cache.keys, values=tuple(p[:-1] for p in cache.values)), x)
