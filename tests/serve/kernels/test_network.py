"""The network equals the model it was made of: every family, ragged batches, chunks, formats."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from muster.model.folder import load_folder
from muster.model.transformer import Transformer
from muster.serve.engine.batch import PagedCache
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import pack_model
from muster.serve.kernels.native import Native
from muster.serve.kernels.packing import Format
from muster.serve.kernels.reference import Reference
from tests.model.test_parity_hf import CASES, randomized
from tests.serve.kernels.ragged import ragged, random_table

LIMIT = 1e-4
BLOCK_TOKENS = 4
SCHEDULE = ((20, 7, 33), (21, 30, 34), (60, 31, 60), (60, 60, 60))
"""Lengths of three sequences after each step: prompts, single tokens and chunks, mixed; the last one alone."""


def model_of(case: str, folder: Path) -> Transformer:
    randomized(case).save_pretrained(folder)
    return load_folder(folder)


def stepwise(
    network: TransformerNetwork,
    tokens: Tensor,
    schedule: Sequence[Sequence[int]],
    cache: PagedCache | None = None,
) -> Tensor:
    """Logits (3, T, V) of tokens (3, T) that arrive as in `schedule`."""
    table = random_table(3, tokens.shape[1], BLOCK_TOKENS)
    cache = cache or network.new_cache(table.numel(), BLOCK_TOKENS)
    for pages in cache.keys + cache.values:
        # What was not written must not be read. Four bytes of -1 are a scale that is nan as well.
        pages.fill_(float("nan") if pages.is_floating_point() else -1)
    logits = torch.full((*tokens.shape, network.spec.vocab), float("nan"))
    before = [0, 0, 0]
    for lengths in schedule:
        rows = [s for s in range(3) if lengths[s] > before[s]]
        batch = ragged(
            [tokens[s, : lengths[s]] for s in rows],
            [lengths[s] - before[s] for s in rows],
            table[rows],
            BLOCK_TOKENS,
        )
        parts = network.logits(batch, cache).split([lengths[s] - before[s] for s in rows])
        for s, part in zip(rows, parts, strict=True):
            logits[s, before[s] : lengths[s]] = part
        before = list(lengths)
    return logits


@pytest.mark.parametrize("case", CASES)
def test_family_equals_the_model(case: str, tmp_path: Path, library: ctypes.CDLL) -> None:
    model = model_of(case, tmp_path)
    tokens = torch.randint(3, 131, (3, 60))
    with torch.no_grad():
        expected = model(tokens)
    packed = pack_model(model, "fp32")
    for kernels in (Native(library, torch.float32), Reference(torch.float32)):
        found = stepwise(TransformerNetwork(packed, kernels), tokens, SCHEDULE)
        assert float((found - expected).abs().max()) <= LIMIT


@pytest.mark.parametrize("case", ["mistral-window", "qwen3"])
def test_every_level_equals_transformers(case: str, tmp_path: Path, each_library: ctypes.CDLL) -> None:
    theirs = randomized(case)
    theirs.save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    tokens = torch.randint(3, 131, (3, 60))
    with torch.no_grad():
        expected = theirs(tokens).logits
    network = TransformerNetwork(pack_model(model, "fp32"), Native(each_library, torch.float32))
    assert float((stepwise(network, tokens, SCHEDULE) - expected).abs().max()) <= LIMIT
    formats: tuple[Format, ...] = ("bf16", "int8", "int4")
    for format in formats:
        packed = pack_model(model, format)
        network = TransformerNetwork(packed, Native(each_library, torch.bfloat16))
        found = stepwise(network, tokens, SCHEDULE)
        assert torch.equal(found, stepwise(network, tokens, [(60, 0, 0), (60, 60, 0), (60, 60, 60)]))
        expected = stepwise(TransformerNetwork(packed, Reference(torch.bfloat16)), tokens, SCHEDULE)
        assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("case", ["llama-tied-bias", "mistral-window", "gpt2", "qwen3-moe"])
def test_torch_alone_equals_the_model(case: str, tmp_path: Path) -> None:
    """Where nothing can be compiled, from weights that were never packed."""
    model = model_of(case, tmp_path)
    tokens = torch.randint(3, 131, (3, 60))
    network = TransformerNetwork(pack_model(model, "fp32", packed=False), Reference(torch.float32))
    with torch.no_grad():
        assert float((stepwise(network, tokens, SCHEDULE) - model(tokens)).abs().max()) <= LIMIT


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3"])
def test_logits_are_the_same_bits_whatever_the_batch(
    case: str, format: Format, tmp_path: Path, library: ctypes.CDLL
) -> None:
    model = model_of(case, tmp_path)
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    network = TransformerNetwork(pack_model(model, format), Native(library, dtype))
    tokens = torch.randint(3, 131, (3, 60))
    mixed = stepwise(network, tokens, SCHEDULE)
    assert mixed.isfinite().all()
    whole = stepwise(network, tokens, [(60, 0, 0), (60, 60, 0), (60, 60, 60)])
    assert torch.equal(mixed, whole)
    singly = stepwise(network, tokens, [(n, n // 2, 0) for n in range(1, 61)] + [(60, 60, 60)])
    assert torch.equal(singly, whole)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_formats_equal_in_cpp_and_torch(format: Format, tmp_path: Path, library: ctypes.CDLL) -> None:
    model = model_of("qwen2", tmp_path)
    packed = pack_model(model, format)
    tokens = torch.randint(3, 131, (3, 60))
    native, torch_alone = (
        stepwise(TransformerNetwork(packed, kernels), tokens, SCHEDULE)
        for kernels in (Native(library, torch.bfloat16), Reference(torch.bfloat16))
    )
    assert float((native - torch_alone).norm() / torch_alone.norm()) < 0.05


@pytest.mark.parametrize("native", [True, False])
def test_only_wanted_rows(native: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    kernels = (
        Native(request.getfixturevalue("library"), torch.float32) if native else Reference(torch.float32)
    )
    network = TransformerNetwork(pack_model(model_of("llama", tmp_path), "fp32"), kernels)
    table = random_table(2, 20, BLOCK_TOKENS)
    batch = ragged([torch.arange(3, 15), torch.arange(9)], (12, 3), table, BLOCK_TOKENS)
    cache = network.new_cache(table.numel(), BLOCK_TOKENS)
    every = network.logits(batch, cache)
    some = network.logits(replace(batch, wanted=torch.tensor([14, 11])), cache)
    torch.testing.assert_close(some, every[[14, 11]])
    assert some.dtype == torch.float32
    none = network.logits(replace(batch, wanted=torch.empty(0, dtype=torch.int64)), cache)
    assert none.shape == (0, network.spec.vocab)
