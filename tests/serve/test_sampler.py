from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from muster.serve.adjust import Adjustment, adjust
from muster.serve.lanes import lane_masses, lane_members, largest, most_likely
from muster.serve.protocol import SamplingParams
from muster.serve.sampler import sample, top_logprobs

VOCAB = 6_000
"""Large enough that only candidates are looked at one by one."""


def draw(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1} | changes))


def normal(rows: int, vocab: int = VOCAB, spread: float = 3.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def drawn(logits: Tensor, times: int, seed: int = 5, **changes: Any) -> Tensor:
    """How often each token of logits (V,) is drawn."""
    rows, counts = 250, torch.zeros(len(logits))
    for first in range(0, times, rows):
        ids, _ = sample(
            logits.expand(rows, -1), [draw(**changes)] * rows, [seed] * rows, range(first, first + rows)
        )
        counts += torch.bincount(torch.tensor(ids), minlength=len(logits))
    return counts


def kept_by_sort(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The definition, written plainly."""
    ordered, ids = logits.double().sort(descending=True, stable=True)
    kept = torch.arange(len(ids)) < (top_k or len(ids))
    p = ordered.softmax(-1).where(kept, 0)
    p = p / p.sum()
    kept &= p.cumsum(-1) - p < top_p
    kept &= p >= min_p * p[0]
    return ids[kept]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    params = [draw(temperature=0), draw(temperature=1e-9)]
    assert sample(logits, params, [0, 0], [0, 0]) == ([1, 0], [True, True])


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert sample(torch.tensor([[3e4, -3e4, 2.9e4]]), [draw(temperature=2e-5)], [0], [0])[0] == [0]


@pytest.mark.parametrize("vocab", [1, 70, 5000, 20_000, 20_037])
def test_the_maximum_is_torchs(vocab: int) -> None:
    logits = normal(9, vocab)
    logits[3, vocab - 1] = 1e4
    logits[4, 0] = 1e4
    logits[5, vocab // 2] = torch.nan
    logits[6, vocab - 1] = torch.nan
    logits[7, :] = 0.0
    values, ids = map(torch.from_numpy, most_likely(logits))
    sound = [0, 1, 2, 3, 4, 7, 8]
    assert torch.equal(values[sound], logits[sound].amax(-1))
    assert torch.equal(ids[sound], logits[sound].argmax(-1))
    assert values[[5, 6]].isnan().all()
    assert sample(logits, [draw(temperature=0)] * 9, [0] * 9, [0] * 9)[1] == [
        row in sound for row in range(9)
    ]


@pytest.mark.parametrize("vocab", [40, 256, 300, 20_037])
@pytest.mark.parametrize("count", [1, 40, 256, 1000])
def test_the_largest_are_those_of_a_stable_sort(vocab: int, count: int) -> None:
    count = min(count, vocab)
    logits = normal(6, vocab)
    logits[1, ::2] = -torch.inf
    logits[2, 3:] = -torch.inf
    logits[3] = 1.5
    logits[4] = logits[4].round()
    values, ids = largest(logits, count)
    expected = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(torch.from_numpy(values).float(), expected.values[:, :count])
    assert torch.equal(torch.from_numpy(ids), expected.indices[:, :count])


@pytest.mark.parametrize("vocab", [40, 256, 20_037])
def test_lanes_add_up_to_the_whole(vocab: int) -> None:
    logits, temperature = normal(5, vocab), np.array([0.3, 0.7, 1.0, 1.7, 4.0])
    scaled = logits.double() / torch.from_numpy(temperature)[:, None]
    exact = (scaled - scaled.amax(dim=1, keepdim=True)).exp()
    masses = lane_masses(logits, temperature)
    assert np.allclose(masses.sum(axis=1), exact.sum(dim=1), rtol=1e-5)
    weights, ids = lane_members(logits, np.array([0, 7, 39, 3, 1]), temperature)
    for row, lane in enumerate((0, 7, 39, 3, 1)):
        assert ids[row, weights[row] > 0].tolist() == list(range(lane, vocab, 256))
        assert np.allclose(weights[row, weights[row] > 0], exact[row, lane::256], rtol=1e-5)
        assert np.isclose(masses[row, lane], weights[row].sum(), rtol=1e-5)


def test_a_row_draws_the_same_alone_and_in_a_crowd() -> None:
    logits = normal(24)
    params = [
        draw(
            temperature=0.5 + row / 10,
            top_k=[0, 0, 5, 300, 2000][row % 5],
            top_p=[1, 0.9, 0.999][row % 3],
            min_p=[0, 0, 0, 0.05][row % 4],
        )
        for row in range(24)
    ]
    seeds = list(range(24))
    for position in range(20):
        crowd, _ = sample(logits, params, seeds, [position] * 24)
        alone = [
            sample(logits[row : row + 1], [params[row]], [seeds[row]], [position])[0][0] for row in range(24)
        ]
        assert crowd == alone


@pytest.mark.parametrize("vocab", [50, VOCAB])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draws_follow_the_distribution(vocab: int, temperature: float) -> None:
    """Chi-squared over the likely tokens and the rest; with the large vocabulary much of it outside the candidates."""
    logits = normal(1, vocab, spread=1.5)[0]
    p = (logits.double() / temperature).softmax(-1)
    counts = drawn(logits, 6_000, temperature=temperature).double()
    order = p.argsort(descending=True)
    groups = [order[:1], order[1:3], order[3:8], order[8:20], order[20:50], order[50:500], order[500:]]
    expected = torch.stack([p[group].sum() for group in groups if len(group)]) * 6_000
    seen = torch.stack([counts[group].sum() for group in groups if len(group)])
    assert float(((seen - expected) ** 2 / expected).sum()) < 24.3  # p = 0.0005 at 6 degrees of freedom
    if vocab == VOCAB:
        assert 0.3 < float(p[order[64:]].sum()) < 0.999, "the unlikely are drawn from, too"


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 5},
        {"top_k": 200},
        {"top_k": 2500},
        {"top_p": 0.2},
        {"top_p": 0.9},
        {"top_k": 40, "top_p": 0.7},
        {"min_p": 0.1},
        {"min_p": 0.001},
        {"top_p": 0.5, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("vocab", [300, VOCAB])
def test_filters_keep_what_their_definition_keeps(filters: dict[str, Any], vocab: int) -> None:
    logits = normal(1, vocab, spread=2.0, seed=3)[0]
    kept = set(kept_by_sort(logits, **filters).tolist())
    seen = set(drawn(logits, 1000, **filters).nonzero().flatten().tolist())
    assert seen <= kept
    assert len(seen) >= min(len(kept), 20) * 0.5
    if len(kept) <= 8:
        assert seen == kept


def test_exactly_k_stay_when_all_are_alike() -> None:
    assert set(drawn(torch.zeros(5), 500, top_k=2).nonzero().flatten().tolist()) == {0, 1}
    assert len(drawn(torch.zeros(VOCAB), 500, top_k=3).nonzero()) == 3


def test_noise_differs_by_seed_and_position() -> None:
    logits = torch.zeros(1, 5000)
    ids = {
        sample(logits, [draw()], [seed], [position])[0][0]
        for seed in range(-10, 10)
        for position in range(10)
    }
    assert len(ids) > 180


def test_two_alike_distributions_draw_the_same_token_mostly() -> None:
    """What a draft model lives on: the noise is the token's, not the place's in the cumulative distribution."""
    logits = normal(1, spread=4.0)[0]
    other = logits + normal(1, spread=0.2, seed=1)[0]
    rows = 400
    one, two = (
        sample(x.expand(rows, -1), [draw()] * rows, [1] * rows, range(rows))[0] for x in (logits, other)
    )
    share = sum(a == b for a, b in zip(one, two, strict=True)) / rows
    overlap = float(torch.minimum(logits.softmax(-1), other.softmax(-1)).sum())
    assert share > overlap / (2 - overlap) - 0.1  # Daliri et al. 2024


def test_penalties_and_biases() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.0, 0.5], [2.0, -2.0, 1.0, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]])
    raw = logits.clone()
    repeated = Adjustment(draw(repetition_penalty=2.0), [0, 1, 1])
    counted = Adjustment(draw(presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((3, -100.0),)), [4])
    for token in (2, 2, 3):
        repeated.push(token)
        counted.push(token)
    adjust(logits, [0, 1], [repeated, counted])
    assert logits[0].tolist() == [1.0, -4.0, 0.5, 0.0, 0.5]
    assert logits[1].tolist() == [2.0, -2.0, 0.0, -100.75, 0.5]
    assert torch.equal(logits[2], raw[2])
    assert not Adjustment.needed(draw())


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    (logprob, top), (_, none) = top_logprobs(logits, tokens=[0, 0], counts=[2, 0])
    expected = logits[0].log_softmax(-1)
    assert logprob == pytest.approx(float(expected[0]))
    assert [id for id, _ in top] == [1, 2]
    assert [value for _, value in top] == pytest.approx([float(expected[1]), float(expected[2])])
    assert none == ()
