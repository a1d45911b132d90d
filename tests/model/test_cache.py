"""Cached decoding equals the full forward pass, whatever the rows' lengths and slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from muster.model.cache import KVCache
from muster.model.generate import generate
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer

CLOSE = {"atol": 1e-4, "rtol": 0}
Make = Callable[[TransformerSpec], Transformer]


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"window": 5}], ids=str)
def test_rows_of_different_lengths(make: Make, spec: TransformerSpec, options: dict[str, Any]) -> None:
    check_rows_of_different_lengths(make(replace(spec, **options)))


@torch.no_grad()
def test_rows_of_different_lengths_with_learned_positions(make: Make, gpt2: TransformerSpec) -> None:
    check_rows_of_different_lengths(make(gpt2))


def check_rows_of_different_lengths(model: Transformer) -> None:
    spec = model.spec
    torch.manual_seed(0)
    sequences = torch.randint(0, spec.vocab, (3, 40))
    full = model(sequences)
    cache = KVCache(spec, slots=5, capacity=48)
    slots, lengths = [4, 0, 2], [3, 17, 30]
    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        logits = model(sequences[row : row + 1, :length], cache=cache.select([slot]))
        torch.testing.assert_close(logits[0], full[row, :length], **CLOSE)
    # Prefill in pieces: two more chunks for the first sequence while the others wait.
    for start, stop in ((3, 8), (8, 20)):
        logits = model(sequences[:1, start:stop], cache=cache.select([4]))
        torch.testing.assert_close(logits[0], full[0, start:stop], **CLOSE)
    lengths[0] = 20
    # Decode together, in another order than that of the slots, then only some of them.
    for rows in ([2, 0, 1], [2, 0, 1], [1, 2], [0]):
        tokens = torch.stack([sequences[row, lengths[row]] for row in rows])[:, None]
        logits = model(tokens, cache=cache.select([slots[row] for row in rows]))
        for index, row in enumerate(rows):
            torch.testing.assert_close(logits[index, 0], full[row, lengths[row]], **CLOSE)
            lengths[row] += 1
    assert cache.lengths == [lengths[1], 0, lengths[2], 0, lengths[0]]


@torch.no_grad()
def test_a_freed_slot_forgets(model: Transformer, spec: TransformerSpec) -> None:
    cache = KVCache(spec, slots=1, capacity=32)
    first, second = torch.randint(0, spec.vocab, (2, 1, 20))
    model(first, cache=cache.select([0]))
    cache.free(0)
    torch.testing.assert_close(model(second[:, :5], cache=cache.select([0])), model(second[:, :5]), **CLOSE)


@torch.no_grad()
def test_a_full_cache_refuses_and_stays_as_it_was(model: Transformer, spec: TransformerSpec) -> None:
    cache = KVCache(spec, slots=2, capacity=10)
    tokens = torch.randint(0, spec.vocab, (1, 10))
    model(tokens[:, :9], cache=cache.select([1]))
    with pytest.raises(ValueError, match="11 tokens does not fit a cache of 10"):
        model(tokens[:, :2], cache=cache.select([1]))
    assert cache.lengths == [0, 9]
    torch.testing.assert_close(
        model(tokens[:, 9:], cache=cache.select([1]))[0, 0], model(tokens)[0, 9], **CLOSE
    )


def test_a_slot_twice_in_one_pass_is_refused(spec: TransformerSpec) -> None:
    with pytest.raises(ValueError, match="repeat"):
        KVCache(spec, slots=2, capacity=10).select([1, 1])


def test_generation_takes_a_sampler(model: Transformer, spec: TransformerSpec) -> None:
    prompt = torch.randint(0, spec.vocab, (2, 4))
    least = generate(model, prompt, 3, choose=lambda logits: logits.argmin(-1))
    assert least.shape == (2, 7)
    assert torch.equal(least[:, :4], prompt)
    with torch.no_grad():
        assert torch.equal(least[:, 4:], model(least)[:, 3:-1].argmin(-1))
