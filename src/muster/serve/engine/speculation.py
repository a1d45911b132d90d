"""Speculative decoding (Leviathan et al. 2023): guess the next tokens cheaply, verify all of them in one step.

The guesses change when tokens come, never which: a verified row draws with the noise that the same position would
have had without guesses, and a guess counts if it is that token. A draft model guesses with that same noise, so that
the two agree as often as their distributions allow (nearly: Daliri et al. 2024). Hence greedy and sampled output
alike equal, token for token, those without speculation, and any replica can continue them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from muster.serve.engine.batch import Network, PagedCache
from muster.serve.engine.blocks import BlockPool, root
from muster.serve.engine.runner import Runner
from muster.serve.engine.scheduler import Work
from muster.serve.engine.sequence import Sequence as Scheduled
from muster.serve.protocol import SamplingParams
from muster.serve.sampler import sample

GUESSES = 4
"""Tokens guessed at once, at most."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A sequence whose next tokens may be guessed."""

    sequence: Scheduled
    params: SamplingParams
    seed: int
    room: int
    """Guesses that could count at most, at least 1."""


class Drafter(Protocol):
    """Guesses next tokens."""

    def propose(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        """Guesses by the sequence's id; of some sequences none."""
        ...

    def forget(self, id: str) -> None:
        """A sequence has ended; unknown ones are ignored."""
        ...


@dataclass(slots=True)
class _Grams:
    """Where runs of tokens went on, by the run; the latest place."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0


class NgramDrafter:
    """Guesses that what came after the last few tokens before comes again (prompt lookup, Saxena 2023)."""

    _RUNS = (4, 3, 2)

    def __init__(self) -> None:
        self._grams: dict[str, _Grams] = {}

    def propose(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        found = {one.sequence.id: self._continued(one) for one in asked}
        return {id: guesses for id, guesses in found.items() if guesses}

    def forget(self, id: str) -> None:
        self._grams.pop(id, None)

    def _continued(self, asked: Asked) -> list[int]:
        tokens = asked.sequence.tokens
        grams = self._grams.setdefault(asked.sequence.id, _Grams())
        for place in range(
            max(grams.indexed, 1), len(tokens)
        ):  # the token here follows the runs that end before it
            for run in self._RUNS:
                if run <= place:
                    grams.after[tuple(tokens[place - run : place])] = place
        grams.indexed = len(tokens)
        for run in self._RUNS:
            seen = grams.after.get(tuple(tokens[-run:])) if run <= len(tokens) else None
            if seen is not None:
                return tokens[seen : seen + min(GUESSES, asked.room)]
        return []


class ModelDrafter:
    """Guesses with a smaller network of the same vocabulary, over a cache of its own.

    It reads `step_tokens` tokens a call at most: a sequence with a long prompt gets guesses a few steps later.
    """

    def __init__(
        self, network: Network, cache: PagedCache, *, vocab: int | None = None, step_tokens: int
    ) -> None:
        self._runner = Runner(network, cache, vocab=vocab)
        self._pool = BlockPool(cache.keys[0].shape[0], cache.block_tokens, prefix_cache=False)
        self._step_tokens = step_tokens
        self._shadows: dict[str, _Shadow] = {}

    def propose(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        ready = [(one, shadow) for one in asked if (shadow := self._followed(one)) is not None]
        budget = self._step_tokens
        guesses: dict[str, list[int]] = {}
        for round in range(GUESSES):
            works, drawing = [], []
            for one, shadow in ready:
                mine = shadow.sequence
                known = len(one.sequence.tokens)
                if len(mine.tokens) - known >= one.room or (round and len(mine.tokens) == known):
                    continue
                stop = min(len(mine.tokens), mine.computed + max(budget, 1))
                budget -= stop - mine.computed
                works.append(Work(mine, mine.computed, stop))
                if works[-1].draws:
                    drawing.append((one, mine))
            if not works:
                break
            logits = self._runner.run(works)
            for work in works:
                work.sequence.computed = work.stop
            if not drawing:
                break
            ids, sound = sample(
                logits,
                [one.params for one, _ in drawing],
                [one.seed for one, _ in drawing],
                [len(mine.tokens) - one.sequence.prompt_tokens for one, mine in drawing],
            )
            for (one, mine), id, fine in zip(drawing, ids, sound, strict=True):
                if fine:
                    mine.tokens.append(id)
                    guesses.setdefault(one.sequence.id, []).append(id)
        return guesses

    def forget(self, id: str) -> None:
        shadow = self._shadows.pop(id, None)
        if shadow is not None:
            self._pool.release(shadow.sequence.blocks)

    def _followed(self, asked: Asked) -> _Shadow | None:
        """The sequence here, brought up to date and with room for guesses; None where no blocks are left."""
        target = asked.sequence
        shadow = self._shadows.get(target.id)
        if shadow is None:
            own = Scheduled(id=target.id, arrival=0, tokens=[], prompt_tokens=0, root=root("draft"))
            shadow = self._shadows[target.id] = _Shadow(own)
        mine = shadow.sequence
        same = shadow.known
        while same < min(len(mine.tokens), len(target.tokens)) and mine.tokens[same] == target.tokens[same]:
            same += 1
        del mine.tokens[same:]
        mine.tokens += target.tokens[same:]
        shadow.known = len(mine.tokens)
        mine.computed = min(mine.computed, same, len(mine.tokens) - 1)
        needed = -(-(len(mine.tokens) + GUESSES) // self._pool.block_tokens)
        if needed - len(mine.blocks) > self._pool.free:
            self.forget(target.id)
            return None
        while len(mine.blocks) < needed:
            mine.blocks.append(self._pool.take())
        return shadow


@dataclass(slots=True)
class _Shadow:
    sequence: Scheduled
    known: int = 0
    """Tokens that are the target's own, before the guesses."""


class Gain:
    """Whether guessing pays: tokens a second with and without, as measured, for each number of running sequences.

    Verified rows are free only as long as the weights' way from memory is what takes the time; so it depends on the
    batch, the machine and the text. Each way is tried again for a few steps now and then.
    """

    _TRIED, _AGAIN, _KEPT = 8, 256, 0.9

    def __init__(self) -> None:
        self._rate: dict[tuple[int, bool], float] = {}
        self._steps: dict[int, int] = {}

    def guesses(self, running: int) -> bool:
        """Whether the next step shall guess."""
        size = running.bit_length()  # 1, 2-3, 4-7, ...
        step = self._steps.get(size, 0) % self._AGAIN
        self._steps[size] = self._steps.get(size, 0) + 1
        if step < 2 * self._TRIED:
            return step < self._TRIED
        return self._rate.get((size, True), 0.0) >= self._rate.get((size, False), 0.0)

    def record(self, running: int, guessed: bool, tokens: int, seconds: float) -> None:
        """A step of nothing but single tokens, and guesses, has taken so long."""
        key = running.bit_length(), guessed
        rate = tokens / max(seconds, 1e-9)
        self._rate[key] = self._KEPT * self._rate.get(key, rate) + (1 - self._KEPT) * rate
