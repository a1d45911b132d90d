from __future__ import annotations

import random

import pytest

from muster.serve.engine.blocks import root
from muster.serve.engine.drafters import NgramDrafter
from muster.serve.engine.sequence import Sequence
from muster.serve.engine.speculation import FREE, GUESSES, Asked, Gain, Hits, Price
from muster.serve.protocol import SamplingParams


def asked(tokens: list[int], *, price: Price = FREE, room: int = 99) -> Asked:
    sequence = Sequence(id="a", arrival=0, tokens=tokens, prompt_tokens=len(tokens), root=root("test"))
    return Asked(sequence, SamplingParams(max_tokens=99), 0, room, price)


def test_hits_are_learned_up_to_the_first_wrong_guess() -> None:
    hits = Hits()
    assert hits.share("new") == 0.5
    assert hits.compare(["a", "b", "c"], [1, 2, 3], [1, 9, 3]) == 1
    assert hits.share("a") > 0.5 > hits.share("b")
    assert hits.share("c") == 0.5, "what follows a wrong guess says nothing"
    assert hits.compare(["a", "b", "c"], [1, 2, 3], [1, 2]) == 2, "the third has not been answered yet"
    for number in range(1000):
        hits.compare(["three in four"], [number % 4], [min(number % 4, 2)])
    assert hits.share("three in four") == pytest.approx(0.75, abs=0.03)
    for _ in range(200):
        hits.compare(["three in four"], [1], [2])
    assert hits.share("three in four") < 0.1, "lately it was never right"


def test_a_guess_costs_the_tokens_of_its_time() -> None:
    gain = Gain()
    assert gain.price(1) == FREE
    for _ in range(50):
        gain.record(1, False, tokens=1, seconds=0.010)
        assert gain.price(1) == FREE, "what a row costs is not known from plain steps"
    for _ in range(50):  # four guesses of 1 ms, and each adds 0.5 ms to the step that verifies it
        gain.record(1, True, tokens=4, seconds=0.016, guesses=4, drafting_s=0.004)
    assert gain.price(1) == Price(guess=pytest.approx(250 * 0.001), row=pytest.approx(250 * 0.0005))
    for _ in range(400):  # nothing worth a guess was found: a plain step, whoever looked for some
        gain.record(1, True, tokens=4, seconds=0.0161, drafting_s=0.0061)
    assert gain.price(1).row == pytest.approx(4 / 0.0161 * 0.0005, rel=0.01)
    assert gain.price(8) == FREE, "other numbers of sequences have costs of their own"


@pytest.mark.parametrize("pays", [True, False])
def test_guessing_goes_on_only_where_it_pays(pays: bool) -> None:
    gain, on = Gain(), []
    for _ in range(2000):
        guessed = gain.guesses(4)
        on.append(guessed)
        with_guesses = 0.015 if pays else 0.03  # twice the tokens in 1.5 or 3 times the time
        gain.record(4, guessed, tokens=8 if guessed else 4, seconds=with_guesses if guessed else 0.01)
    share = sum(on[500:]) / len(on[500:])
    assert share > 0.9 if pays else share < 0.1


def test_the_text_guesses_as_far_as_it_pays() -> None:
    text = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 5, 6]
    assert NgramDrafter().propose([asked(text)]) == {"a": text[2 : 2 + GUESSES]}
    assert NgramDrafter().propose([asked(text, room=3)]) == {"a": [7, 8, 9]}
    assert NgramDrafter().propose([asked(text, price=Price(row=0.2))]) == {"a": [7, 8]}, "1/2, 1/4, not 1/8"
    assert NgramDrafter().propose([asked(text, price=Price(row=0.6))]) == {}
    round_and_round = [1, 2, 3, 1, 2, 3, 1, 2]
    assert NgramDrafter().propose([asked(round_and_round)]) == {"a": [3, 1, 2, 3, 1, 2, 3, 1]}
    drafter, text = NgramDrafter(), [*range(40)] * 7
    for length in range(50, 250, GUESSES + 1):
        drafter.propose([asked(text[:length])])
    dear = asked(text[:257], price=Price(row=0.6))
    assert drafter.propose([dear]) == {"a": list(range(17, 17 + GUESSES))}, "these have always been right"


def test_a_poor_stretch_does_not_end_what_pays() -> None:
    """Guesses that bring 1.3 times as much on the whole, in steps of one token or of four."""
    on = 0
    for seed in range(8):
        gain, rng = Gain(), random.Random(seed)
        for _ in range(1000):
            guessed = gain.guesses(1)
            on += guessed
            lucky = rng.random() < 0.3  # 0.7 + 1.2 = 1.9 tokens in 1.46 times the time
            gain.record(1, guessed, tokens=4 if guessed and lucky else 1, seconds=0.0146 if guessed else 0.01)
    assert on > 0.6 * 8 * 1000, "ten steps of memory: a quarter"
