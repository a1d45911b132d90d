"""What a benchmark sends, and when: a pure function of a seed, so that every server gets the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Synthetic requests. Prompts are token ids, so that their length is exact on every server."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0
    """Tokens in front of each prompt's own, the same in all requests of a group: a system prompt."""
    groups: int = 1
    spread: float = 0.0
    """Lengths are uniform within this share of the stated ones, above and below."""
    vocab: int = 256
    """Token ids are drawn below this."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of a workload."""

    number: int
    prompt: tuple[int, ...]
    output_tokens: int


def requests(workload: Workload) -> Iterator[Sent]:
    """The workload's requests in order."""
    chance = random.Random(workload.seed)
    prefixes = [
        _tokens(chance, workload.shared_prefix_tokens, workload.vocab) for _ in range(workload.groups)
    ]
    for number in range(workload.requests):
        own = _tokens(chance, _about(chance, workload.prompt_tokens, workload.spread), workload.vocab)
        output = _about(chance, workload.output_tokens, workload.spread)
        yield Sent(number, prefixes[number % workload.groups] + own, output)


def arrivals_s(count: int, rate: float, seed: int) -> list[float]:
    """Times of `count` arrivals of a Poisson process of `rate` a second, from 0 on."""
    chance = random.Random(f"arrivals {seed}")
    gaps = [0.0, *(chance.expovariate(rate) for _ in range(count - 1))]
    return list(accumulate(gaps[:count]))


def _tokens(chance: random.Random, count: int, vocab: int) -> tuple[int, ...]:
    return tuple(chance.randrange(vocab) for _ in range(count))


def _about(chance: random.Random, middle: int, spread: float) -> int:
    least, most = round(middle * (1 - spread)), round(middle * (1 + spread))
    return max(chance.randint(least, most), 1)
