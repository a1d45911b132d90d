"""Who guesses next tokens: the text itself, a smaller model, or whichever of the two has been right more often.

A guess that is likely to be wrong is not worth a row of the step that verifies it, nor the time of the next one. How
likely that is, each drafter learns from what became of guesses like it (`Hits`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from muster.serve.engine.batch import Network, PagedCache
from muster.serve.engine.blocks import BlockPool, root
from muster.serve.engine.runner import Runner
from muster.serve.engine.scheduler import Work
from muster.serve.engine.sequence import Sequence as Scheduled
from muster.serve.engine.speculation import GUESSES, Asked, Hits
from muster.serve.sampler import GREEDY_BELOW, sample


@dataclass(slots=True)
class _Grams:
    """Where runs of tokens went on, by the run; the latest place."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0
    known: int = 0
    """Tokens that there were when it last guessed."""
    guesses: list[int] = field(default_factory=list)
    kinds: list[Hashable] = field(default_factory=list)


class NgramDrafter:
    """Guesses that what came after the last few tokens before comes again (prompt lookup, Saxena 2023)."""

    _RUNS = (8, 4, 3, 2)

    def __init__(self) -> None:
        self._grams: dict[str, _Grams] = {}
        self._hits = Hits()

    def propose(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        return self.surer(asked, 0.0)

    def surer(self, asked: Sequence[Asked], share: float) -> dict[str, list[int]]:
        """Guesses only where the first is likelier to be right than that."""
        found: dict[str, list[int]] = {}
        for one in asked:
            grams = self._guessed(one)
            if not grams.guesses or self._hits.share(grams.kinds[0]) < share:
                continue
            chance, worth = 1.0, 0
            for kind in grams.kinds:
                chance *= self._hits.share(kind)
                if chance < one.price.guess + one.price.row:
                    break
                worth += 1
            if worth:
                found[one.sequence.id] = grams.guesses[:worth]
        return found

    def forget(self, id: str) -> None:
        self._grams.pop(id, None)

    def _guessed(self, asked: Asked) -> _Grams:
        """What is known of a sequence, with guesses at what comes next."""
        tokens = asked.sequence.tokens
        grams = self._grams.setdefault(asked.sequence.id, _Grams())
        self._hits.compare(grams.kinds, grams.guesses, tokens[grams.known :])
        for place in range(
            max(grams.indexed, 1), len(tokens)
        ):  # the token here follows the runs that end before it
            for run in self._RUNS:
                if run <= place:
                    grams.after[tuple(tokens[place - run : place])] = place
        grams.indexed = grams.known = len(tokens)
        grams.guesses, grams.kinds = [], []
        for run in self._RUNS:
            seen = grams.after.get(tuple(tokens[-run:])) if run <= len(tokens) else None
            if seen is not None:
                grams.guesses = tokens[seen : seen + min(GUESSES, asked.room)]
                while len(grams.guesses) < min(GUESSES, asked.room):  # at the end: it goes round and round
                    grams.guesses.append(grams.guesses[seen - len(tokens)])
                # A guess that was right makes the run longer.
                grams.kinds = [min(run + ahead, 2 * GUESSES) for ahead in range(len(grams.guesses))]
                break
        return grams


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
        self._hits = Hits()
        self._first_hits = Hits()

    @property
    def usual_share(self) -> float:
        """Of first guesses, those that were right lately."""
        return self._first_hits.share(None)

    def propose(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        going_on = [(one, shadow) for one in asked if (shadow := self._followed(one)) is not None]
        budget = self._step_tokens
        for _ in range(GUESSES):
            works, drawing = [], []
            for one, shadow in going_on:
                mine = shadow.sequence
                stop = min(len(mine.tokens), mine.computed + max(budget, 1))
                budget -= stop - mine.computed
                works.append(Work(mine, mine.computed, stop))
                if works[-1].draws:
                    drawing.append((one, shadow))
            if not works:
                break
            logits = self._runner.run(works)
            for work in works:
                work.sequence.computed = work.stop
            if not drawing:
                break
            self._draw(drawing, logits)
            going_on = [(one, shadow) for one, shadow in drawing if self._pays(one, shadow)]
        return {
            one.sequence.id: shadow.sequence.tokens[shadow.known : shadow.known + shadow.worth]
            for one in asked
            if (shadow := self._shadows.get(one.sequence.id)) is not None and shadow.worth
        }

    def forget(self, id: str) -> None:
        shadow = self._shadows.pop(id, None)
        if shadow is not None:
            self._pool.release(shadow.sequence.blocks)

    def _draw(self, drawing: Sequence[tuple[Asked, _Shadow]], logits: Tensor) -> None:
        """Another guess for each, from logits (W, V)."""
        if all(one.params.temperature < GREEDY_BELOW for one, _ in drawing):
            likely = logits.softmax(dim=1).max(dim=1)  # as `sample`, in 20 instead of 120 us
            ids, shares = likely.indices.tolist(), likely.values.tolist()
            sound = [math.isfinite(share) for share in shares]
        else:
            ids, sound = sample(
                logits,
                [one.params for one, _ in drawing],
                [one.seed for one, _ in drawing],
                [len(shadow.sequence.tokens) - one.sequence.prompt_tokens for one, shadow in drawing],
            )
            chosen = torch.tensor(ids, device=logits.device)[:, None]
            shares = (logits.gather(1, chosen)[:, 0] - logits.logsumexp(dim=1)).exp().tolist()
        for (one, shadow), id, fine, share in zip(drawing, ids, sound, shares, strict=True):
            shadow.going_on = fine
            if fine:
                shadow.sequence.tokens.append(id)
                shadow.kinds.append((one.params.temperature < GREEDY_BELOW, int(10 * share)))

    def _pays(self, asked: Asked, shadow: _Shadow) -> bool:
        """Count the last guess as worth verifying, or not; and whether one more is worth making."""
        if not shadow.going_on:
            return False
        price = asked.price
        shadow.chance *= self._hits.share(shadow.kinds[-1])
        if shadow.chance < price.row:
            return False
        shadow.worth += 1
        return shadow.worth < asked.room and shadow.chance >= price.row + price.guess

    def _followed(self, asked: Asked) -> _Shadow | None:
        """The sequence here, brought up to date and with room for guesses; None where no blocks are left."""
        target = asked.sequence
        shadow = self._shadows.get(target.id)
        if shadow is None:
            own = Scheduled(id=target.id, arrival=0, tokens=[], prompt_tokens=0, root=root("draft"))
            shadow = self._shadows[target.id] = _Shadow(own)
        mine, came = shadow.sequence, target.tokens[shadow.known :]
        if shadow.kinds and came:
            guesses = mine.tokens[shadow.known :]
            self._first_hits.compare([None], guesses, came)
            shadow.known += self._hits.compare(shadow.kinds, guesses, came)
        del mine.tokens[shadow.known :]
        mine.computed = min(mine.computed, shadow.known)
        mine.tokens += target.tokens[shadow.known :]
        shadow.follow(len(mine.tokens))
        mine.computed = min(mine.computed, len(mine.tokens) - 1)
        needed = -(-(len(mine.tokens) + GUESSES) // self._pool.block_tokens)
        if needed - len(mine.blocks) > self._pool.free:
            self.forget(target.id)
            return None
        while len(mine.blocks) < needed:
            mine.blocks.append(self._pool.take())
        return shadow


@dataclass(slots=True)
class _Shadow:
    """A sequence as the draft model has it: the target's tokens, then its own guesses."""

    sequence: Scheduled
    known: int = 0
    """Tokens that are the target's own, before the guesses."""
    kinds: list[Hashable] = field(default_factory=list)
    """Of each guess, for `Hits`."""
    chance: float = 1.0
    """That all guesses so far are right."""
    worth: int = 0
    """Guesses that are worth verifying."""
    going_on: bool = True

    def follow(self, known: int) -> None:
        """Guess anew, after so many tokens."""
        self.known, self.chance, self.worth, self.going_on = known, 1.0, 0, True
        self.kinds.clear()


class EitherDrafter:
    """Guesses from the text where these have been right at least as often as the model's, which cost time."""

    def __init__(self, text: NgramDrafter, model: ModelDrafter) -> None:
        self._text, self._model = text, model

    def propose(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        found = self._text.surer(asked, self._model.usual_share)
        rest = [one for one in asked if one.sequence.id not in found]
        return found | (self._model.propose(rest) if rest else {})

    def forget(self, id: str) -> None:
        self._text.forget(id)
        self._model.forget(id)
