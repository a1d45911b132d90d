"""What the next step of the engine computes: a pure function over plain data.

Iteration-level scheduling (Orca, Yu et al. 2022) over fixed slots: a waiting sequence takes a free
slot as soon as there is one, in order of arrival; a step advances every sequence whose prompt is
done by one token and prefills a bounded number of prompt tokens, so that long prompts delay the
others' next token by that much at most (chunked prefill). Knows neither tensors nor threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """A sequence in a slot: how much of its prompt the cache holds."""

    arrival: int
    """Running number of the request; smaller came first."""
    prompt_tokens: int
    cached_tokens: int

    @property
    def prefilled(self) -> bool:
        return self.cached_tokens >= self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Prefill:
    """Feed prompt[start:stop] of the sequence in `slot`; at the prompt's end its first token is drawn."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Step:
    """The work of one step; both parts may be empty."""

    prefills: tuple[Prefill, ...]
    decode: tuple[int, ...]
    """Slots that get one more token each."""


def admissions(waiting: int, slots: Sequence[Progress | None]) -> tuple[int, ...]:
    """Free slots for the first of the `waiting` sequences, lowest first, one each."""
    free = [slot for slot, progress in enumerate(slots) if progress is None]
    return tuple(free[:waiting])


def next_step(slots: Sequence[Progress | None], prefill_tokens: int) -> Step:
    """Decide one step: a token for all that are past their prompt, and up to `prefill_tokens` of the
    other prompts, oldest first."""
    held = [(progress, slot) for slot, progress in enumerate(slots) if progress is not None]
    prefills: list[Prefill] = []
    budget = prefill_tokens
    for progress, slot in sorted(held, key=lambda pair: pair[0].arrival):
        if progress.prefilled or budget == 0:
            continue
        start = progress.cached_tokens
        stop = min(start + budget, progress.prompt_tokens)
        prefills.append(Prefill(slot, start, stop))
        budget -= stop - start
    return Step(tuple(prefills), tuple(slot for progress, slot in held if progress.prefilled))
