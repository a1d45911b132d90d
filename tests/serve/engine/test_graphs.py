"""Steps of fixed size: what fills them up changes nothing. Their recording is tested where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from muster.model.transformer import Transformer
from muster.serve.engine.batch import Batch, PagedCache
from muster.serve.engine.graphs import SIZES, GraphedNetwork, StaticBatch
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed import pack_model
from muster.serve.kernels.ops import choose_kernels
from tests.serve.kernels.ragged import ragged, random_table

BLOCK_TOKENS = 4
LENGTHS = (5, 1, 9)


def prompts_and_step(vocab: int) -> tuple[Batch, Batch]:
    """All but the last tokens of some sequences, and a step that computes the last ones."""
    torch.manual_seed(0)
    sequences = [torch.randint(0, vocab, (length,)) for length in LENGTHS]
    table = random_table(len(LENGTHS), max(LENGTHS), BLOCK_TOKENS)
    long = [i for i, length in enumerate(LENGTHS) if length > 1]
    before = ragged(
        [sequences[i][:-1] for i in long], [LENGTHS[i] - 1 for i in long], table[long], BLOCK_TOKENS
    )
    return before, ragged(sequences, [1] * len(sequences), table, BLOCK_TOKENS)


def test_a_step_that_is_filled_up(make_model: Callable[..., Transformer]) -> None:
    network, _ = TransformerNetwork.of(make_model(), "fp32")
    before, step = prompts_and_step(network.spec.vocab)
    fixed = StaticBatch(8, 16, torch.device("cpu"))
    for _ in range(2):  # the second time over what the first has left
        fixed.fill(step)
    results: list[tuple[torch.Tensor, PagedCache]] = []
    for batch in (step, fixed.batch):
        cache = network.new_cache(step.table.numel(), BLOCK_TOKENS)
        network.logits(before, cache)
        results.append((network.logits(batch, cache), cache))
    (exact, cache), (filled, other) = results
    assert torch.equal(filled[: len(LENGTHS)], exact)
    for mine, theirs in zip((*other.keys, *other.values), (*cache.keys, *cache.values), strict=True):
        assert torch.equal(mine, theirs)


def test_sizes_leave_no_gap() -> None:
    assert SIZES[0] == 1
    assert list(SIZES) == sorted(set(SIZES))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_recorded_steps(make_model: Callable[..., Transformer], format: str) -> None:
    model = make_model(head_dim=16)
    compute = torch.float32 if format == "fp32" else torch.bfloat16
    kernels, _ = choose_kernels(compute, "cuda")
    packed = pack_model(model, format, packed=False)  # type: ignore[arg-type]
    before, step = prompts_and_step(model.spec.vocab)
    results = []
    for kind in (TransformerNetwork, GraphedNetwork):
        network = kind(packed, kernels)
        cache = network.new_cache(step.table.numel(), BLOCK_TOKENS)
        network.logits(before, cache)
        results.append([network.logits(step, cache).clone() for _ in range(3)])
    for exact, found in zip(*results, strict=True):
        assert torch.allclose(found, exact, rtol=1e-3, atol=1e-3)
