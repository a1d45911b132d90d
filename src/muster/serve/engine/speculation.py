"""Speculative decoding (Leviathan et al. 2023): guess the next tokens cheaply, verify all of them in one step.

The guesses change when tokens come, never which: a verified row draws with the noise that the same position would
have had without guesses, and a guess counts if it is that token. A draft model guesses with that same noise, so that
the two agree as often as their distributions allow (nearly: Daliri et al. 2024). Hence greedy and sampled output
alike equal, token for token, those without speculation, and any replica can continue them.

Who guesses is in `drafters.py`; here is what all of them share, and what it is worth.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from muster.serve.engine.sequence import Sequence as Scheduled
from muster.serve.protocol import SamplingParams

GUESSES = 8
"""Tokens guessed at once, at most: fewer where a guess is less likely to count than its price."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one more guess costs: tokens that could have been generated in that time. So a guess pays where it is
    likelier to count than that."""

    guess: float = 0.0
    """Of making it."""
    row: float = 0.0
    """Of verifying it: a row more in the step."""


FREE = Price()


@dataclass(frozen=True, slots=True)
class Asked:
    """A sequence whose next tokens may be guessed."""

    sequence: Scheduled
    params: SamplingParams
    seed: int
    room: int
    """Guesses that could count at most, at least 1."""
    price: Price = FREE


class Drafter(Protocol):
    """Guesses next tokens."""

    def propose(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        """Guesses by the sequence's id; of some sequences none."""
        ...

    def forget(self, id: str) -> None:
        """A sequence has ended; unknown ones are ignored."""
        ...


class Hits:
    """How often guesses of a kind have been right lately. A kind that is new counts as even odds."""

    _KEPT = 0.98

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[float, float]] = {}  # (right, all), older ones for less

    def share(self, kind: Hashable) -> float:
        """Of guesses like this one, those that were right."""
        right, seen = self._seen.get(kind, (0.0, 0.0))
        return (right + 1) / (seen + 2)

    def compare(self, kinds: Sequence[Hashable], guesses: Sequence[int], tokens: Sequence[int]) -> int:
        """Learn from guesses and the tokens that came, as far as both go; returns how many were right.

        What follows a wrong guess was guessed from a text that never came, and says nothing.
        """
        for count, (kind, guess, token) in enumerate(zip(kinds, guesses, tokens, strict=False)):
            right, seen = self._seen.get(kind, (0.0, 0.0))
            self._seen[kind] = self._KEPT * right + (guess == token), self._KEPT * seen + 1
            if guess != token:
                return count
        return min(len(guesses), len(tokens))


class _Mean:
    """Of recent figures, about the last fifty: what a step brings varies, and a few poor ones must not decide."""

    _KEPT = 0.98

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    def add(self, figure: float) -> None:
        self._total = self._KEPT * self._total + figure
        self._weight = self._KEPT * self._weight + 1

    @property
    def value(self) -> float | None:
        return self._total / self._weight if self._weight else None


class _Rate:
    """Tokens a second: those of all steps in the time of all steps, which is not the mean of each step's."""

    def __init__(self) -> None:
        self._tokens, self._seconds = _Mean(), _Mean()

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens.add(tokens)
        self._seconds.add(seconds)

    @property
    def value(self) -> float:
        return (self._tokens.value or 0.0) / max(self._seconds.value or 0.0, 1e-9)


class _Costs:
    """What steps of about as many sequences have brought and cost."""

    def __init__(self) -> None:
        self.steps = 0
        self.rate = {True: _Rate(), False: _Rate()}
        """With and without guessing."""
        self.plain_s, self.verifying_s = _Mean(), _Mean()
        """Of a step without and with guesses, less the time that making them took."""
        self.guesses, self.drafting_s = _Mean(), _Mean()
        """Of a step with guesses."""


class Gain:
    """Whether guessing pays, and what a guess costs, as measured, for each number of running sequences.

    Verified rows are free only as long as the weights' way from memory is what takes the time; so it depends on the
    batch, the machine and the text. Each way is tried again for a few steps now and then.
    """

    _PLAIN, _TRIED, _AGAIN = 8, 16, 256
    """Steps without guesses, which come first since prices are in their terms, then with; after so many again."""

    def __init__(self) -> None:
        self._costs: dict[int, _Costs] = {}

    def guesses(self, running: int) -> bool:
        """Whether the next step shall guess."""
        costs = self._of(running)
        step = costs.steps % self._AGAIN
        costs.steps += 1
        if step < self._PLAIN + self._TRIED:
            return step >= self._PLAIN
        return costs.rate[True].value >= costs.rate[False].value

    def price(self, running: int) -> Price:
        """Of one more guess; nothing as long as that is not known."""
        costs = self._of(running)
        plain_s, verifying_s = costs.plain_s.value, costs.verifying_s.value
        guesses, drafting_s = costs.guesses.value, costs.drafting_s.value
        if plain_s is None or verifying_s is None or guesses is None or drafting_s is None:
            return FREE
        rate = max(rate.value for rate in costs.rate.values())
        return Price(guess=rate * drafting_s / guesses, row=rate * max(verifying_s - plain_s, 0.0) / guesses)

    def record(
        self,
        running: int,
        guessed: bool,
        tokens: int,
        seconds: float,
        *,
        guesses: int = 0,
        drafting_s: float = 0.0,
    ) -> None:
        """A step of nothing but single tokens, and guesses, has taken so long, making the guesses included."""
        costs = self._of(running)
        costs.rate[guessed].add(tokens, seconds)
        if guesses:
            costs.guesses.add(guesses)
            costs.drafting_s.add(drafting_s)
            costs.verifying_s.add(seconds - drafting_s)
        else:
            costs.plain_s.add(seconds - drafting_s)

    def _of(self, running: int) -> _Costs:
        return self._costs.setdefault(running.bit_length(), _Costs())  # 1, 2-3, 4-7, ...
