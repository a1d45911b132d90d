from __future__ import annotations

import pytest
import torch

from muster.serve.sampler import Draw, invert_cdf, keep_top, sample, top_logprobs, uniform


def draw(**changes: float) -> Draw:
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "position": 0} | changes
    return Draw(**settings)  # type: ignore[arg-type]


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, [draw(temperature=0), draw(temperature=1e-9)]).tolist() == [1, 0]


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[3e4, -3e4, 2.9e4]])
    assert sample(logits, [draw(temperature=2e-5)]).tolist() == [0]


def test_a_row_draws_the_same_alone_and_in_a_crowd() -> None:
    logits = torch.randn(16, 100, generator=torch.Generator().manual_seed(0))
    draws = [
        draw(seed=row, position=7, temperature=0.5 + row / 10, top_k=row * 3 % 11, top_p=1 - row % 3 / 10)
        for row in range(16)
    ]
    crowd = sample(logits, draws).tolist()
    assert crowd == [int(sample(logits[row : row + 1], [draws[row]])) for row in range(16)]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniforms = [uniform(seed=3, position=position) for position in range(20_000)]
    drawn = invert_cdf(probabilities.expand(len(uniforms), -1), uniforms)
    shares = torch.bincount(drawn, minlength=4) / len(uniforms)
    assert shares[1] == 0
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_uniforms_differ_by_seed_and_position_and_stay_below_one() -> None:
    numbers = {uniform(seed, position) for seed in range(-50, 50) for position in range(50)}
    assert len(numbers) == 5000
    assert all(0 <= number < 1 for number in numbers)


def test_the_largest_uniform_never_draws_a_token_of_probability_zero() -> None:
    probabilities = torch.tensor([[0.3, 0.7, 0.0, 0.0]])
    assert invert_cdf(probabilities, [1 - 2**-40]).tolist() == [1]
    assert invert_cdf(torch.tensor([[0.0, 1.0]]), [0.0]).tolist() == [1]


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        (1, 0.1, [1]),
        (0, 0.39, [1]),  # the first token alone reaches 0.4
        (0, 0.41, [1, 3]),
        (0, 0.7, [1, 3]),
        (3, 0.999, [0, 1, 3]),  # top-p counts what top-k left
        (99, 1.0, [0, 1, 2, 3]),
    ],
)
def test_top_k_and_top_p_keep(top_k: int, top_p: float, kept: list[int]) -> None:
    logits = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()
    assert keep_top(logits, [top_k], [top_p])[0].isfinite().nonzero().flatten().tolist() == kept


def test_ties_at_the_border_of_top_k_go_to_the_smaller_ids() -> None:
    assert keep_top(torch.zeros(1, 5), [2], [1.0])[0].isfinite().tolist() == [True, True, False, False, False]


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    logprob, top = top_logprobs(logits, token=0, count=2)
    expected = logits.log_softmax(-1)
    assert logprob == pytest.approx(float(expected[0]))
    assert [id for id, _ in top] == [1, 2]
    assert [value for _, value in top] == pytest.approx([float(expected[1]), float(expected[2])])
    assert top_logprobs(logits, token=0, count=0)[1] == ()
