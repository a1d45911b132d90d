"""One step after another: requests in, tokens out, without threads or sockets.

The scheduler decides, the runner computes, the sampler draws; this is where they meet. When a step fails, its
sequences are computed one by one, so that what was wrong with one fails that one.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from muster.errors import UsageError
from muster.serve.adjust import Adjustment
from muster.serve.crossing import Outcome
from muster.serve.engine.batch import Network, NetworkLost, PagedCache
from muster.serve.engine.blocks import BlockPool, Key, root
from muster.serve.engine.drawing import Live, accepted, draw
from muster.serve.engine.runner import Runner
from muster.serve.engine.scheduler import Scheduler, Work
from muster.serve.engine.sequence import Sequence as Scheduled
from muster.serve.engine.speculation import FREE, Asked, Drafter, Gain
from muster.serve.guide import Guides, Matcher
from muster.serve.protocol import EngineError, Request, Stats, Token

_LOG = logging.getLogger(__name__)

_NOT_FINITE = "the model's output is not finite (nan or inf): its weights may be damaged"


class Core:
    """Continuous batching over a paged cache.

    `streams` sequences run at once, a step computes `step_tokens` tokens at most. Tokens from `vocab` on (padding
    of the embedding matrix) are never drawn. `salt` names what the weights are: blocks of others are not shared.
    `drafter` guesses tokens ahead where that is measured to pay, or always. `adapters` are the names of the network's,
    in its order.
    """

    def __init__(
        self,
        network: Network,
        cache: PagedCache,
        *,
        streams: int,
        step_tokens: int,
        context_tokens: int,
        vocab: int | None = None,
        prefix_cache: bool = True,
        salt: str = "",
        guides: Guides | None = None,
        drafter: Drafter | None = None,
        always_draft: bool = False,
        weights_step: int = 0,
        adapters: Sequence[str] = (),
    ) -> None:
        self.pool = pool = BlockPool(cache.keys[0].shape[0], cache.block_tokens, prefix_cache=prefix_cache)
        self.streams = streams
        self._scheduler = Scheduler(pool, streams=streams, step_tokens=step_tokens)
        if self._scheduler.capacity_tokens < context_tokens:
            raise ValueError(
                f"{pool.blocks} blocks of {pool.block_tokens} tokens hold {self._scheduler.capacity_tokens} tokens "
                f"of one sequence, but the context is {context_tokens}"
            )
        self._context_tokens = context_tokens
        self._runner = Runner(network, cache, vocab=vocab)
        self._adapters = {name: number for number, name in enumerate(("", *adapters))}
        self._roots, self._weights_step = self._rooted(salt), weights_step
        self._guides = guides
        self._drafter, self._gain = drafter, None if always_draft else Gain()
        self._drafted = self._accepted_tokens = 0
        self._live: dict[str, Live] = {}
        self._embeds = 0
        """Requests for embeddings among them."""
        self._arrivals = 0
        self._outcome = Outcome()
        self._steps = self._prompt_tokens = self._generated = 0

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._live or self._outcome.items)

    def add(self, request: Request) -> None:
        """Queue a request."""
        prompt, params = request.prompt, request.params
        try:
            matcher = self._checked(request)
        except UsageError as refusal:
            self._outcome.items.append((request.id, EngineError(str(refusal))))
            return
        adapter = self._adapters[request.adapter]
        sequence = Scheduled(
            id=request.id,
            arrival=self._arrivals,
            tokens=[*prompt, *request.generated],
            prompt_tokens=len(prompt),
            root=self._roots[adapter],
            adapter=adapter,
            priority=request.priority,
            client=request.client,
            preempted=bool(request.generated),  # elsewhere: it has waited once
        )
        self._arrivals += 1
        self._embeds += request.embed
        self._live[request.id] = Live(
            request,
            sequence,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            adjustment=Adjustment(params, prompt, request.generated) if Adjustment.needed(params) else None,
            matcher=matcher,
            # Guesses are for draws that depend on nothing but the tokens before.
            guessed=matcher is None and not params.penalized and not request.embed,
        )
        self._scheduler.add(sequence)

    def _checked(self, request: Request) -> Matcher | None:
        """What keeps its text to its guide, if it has one; UsageError for what cannot be computed here."""
        request.check(self._context_tokens)
        if request.adapter not in self._adapters:
            raise UsageError(f"no adapter is called '{request.adapter}'")
        if request.params.guide is None:
            return None
        if self._guides is None:
            raise UsageError("this engine has no structured output")
        matcher = self._guides.start(request.params.guide)
        for id in request.generated:
            matcher.push(id)
        return matcher

    def cancel(self, request_id: str) -> None:
        """Forget a request and free what it holds; unknown ones are ignored."""
        live = self._live.get(request_id)
        if live is not None:
            self._forget(live)

    def renew(self, network: Network, *, salt: str, weights_step: int) -> None:
        """Compute with other weights of the same model from now on.

        Sequences that run keep the tokens they have, and go on as if the new weights had been given those: their keys
        and values are computed again.
        """
        self._runner.renew(network)
        self._roots, self._weights_step = self._rooted(salt), weights_step
        self._scheduler.restart(self._roots)

    @property
    def root(self) -> Key:
        """The key before the first block of a sequence without an adapter."""
        return self._roots[0]

    def abandon(self) -> Outcome:
        """End all requests, as the engine is stopping."""
        for live in list(self._live.values()):
            self._end(live, EngineError("the engine is stopping"))
        return self._handed_over()

    def step(self) -> Outcome:
        """Compute one step."""
        began, before = time.perf_counter(), self._generated
        guess = self._drafter is not None and (
            self._gain is None or self._gain.guesses(len(self._scheduler.running))
        )
        drafts = self._guesses() if guess else None
        drafting_s = time.perf_counter() - began
        plan = self._scheduler.plan(drafts)
        self._outcome.admitted += [sequence.id for sequence in plan.admitted]
        if plan.works:
            self._steps += 1
            self._runner.prepare(plan.chores)
            works = plan.works
            if self._embeds:
                for group, hidden in self._computed([w for w in works if self._embedded(w)], embed=True):
                    self._deliver_embeddings(group, hidden)
                works = tuple(w for w in works if w.sequence.id in self._live and not self._embedded(w))
            for group, logits in self._computed(works):
                self._settle(group, logits)
            if self._gain is not None and all(work.stop - work.start == 1 for work in plan.works):
                took = time.perf_counter() - began
                guesses = sum(len(work.draft) for work in plan.works)
                self._gain.record(
                    len(plan.works),
                    guess,
                    self._generated - before,
                    took,
                    drafting_s=drafting_s,
                    guesses=guesses,
                )
        return self._handed_over()

    def _rooted(self, salt: str) -> list[Key]:
        """Keys before the first block, by adapter: none finds what another has computed."""
        return [root(f"{salt}/{name}" if name else salt) for name in self._adapters]

    def _guesses(self) -> dict[str, list[int]]:
        assert self._drafter is not None
        asked = []
        price = FREE if self._gain is None else self._gain.price(len(self._scheduler.running))
        for sequence in self._scheduler.running:
            live = self._live[sequence.id]
            room = live.request.params.max_tokens - live.generated - 1
            if live.guessed and sequence.missing == 1 and room > 0:
                asked.append(Asked(sequence, live.request.params, live.seed, room, price))
        try:
            return self._drafter.propose(asked) if asked else {}
        except Exception as error:  # worth a line, not a request
            _LOG.error("guessing ahead failed, and is off from now on", exc_info=error)
            self._drafter = None
            return {}

    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks=scheduler.pool.blocks,
            used_blocks=scheduler.pool.used,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            prefix_query_tokens=scheduler.counts.prefix_query_tokens,
            prefix_hit_tokens=scheduler.counts.prefix_hit_tokens,
            preemptions=scheduler.counts.preemptions,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted_tokens,
            weights_step=self._weights_step,
        )

    def _handed_over(self) -> Outcome:
        outcome, self._outcome = self._outcome, Outcome()
        outcome.stats = self.stats()
        return outcome

    def _embedded(self, work: Work) -> bool:
        return self._of(work).request.embed

    def _deliver_embeddings(self, works: Sequence[Work], hidden: Tensor) -> None:
        """Hand out the last hidden states (W, E) of prompts that are complete."""
        rows = iter(F.normalize(hidden.float(), dim=-1).tolist())
        for work in works:
            self._prompt_tokens += work.stop - work.start
            self._scheduler.advance(work, ())
            if work.draws:
                live, row = self._of(work), next(rows)
                if all(map(math.isfinite, row)):
                    live.sequence.sound = True
                    token = Token(id=0, finish_reason="stop", embedding=tuple(row))
                    self._outcome.items.append((live.request.id, token))
                    self._forget(live)
                else:
                    self._end(live, EngineError(_NOT_FINITE), damaged=True)

    def _computed(
        self, works: Sequence[Work], *, embed: bool = False
    ) -> Iterator[tuple[Sequence[Work], Tensor]]:
        """Works with their logits or, for `embed`, hidden states: all at once, or one by one where that fails."""
        if not works:
            return
        try:
            logits = self._runner.run(works, hidden=embed)
        except NetworkLost:
            raise
        except Exception as error:
            _LOG.error("a step of %d sequences failed", len(works), exc_info=error)
            if len(works) == 1:
                cause = f"generation failed ({type(error).__name__}); the server's log has the details"
                self._end(self._of(works[0]), EngineError(cause))
                return
        else:
            yield works, logits
            return
        for work in works:
            yield from self._computed([work], embed=embed)

    def _settle(self, works: Sequence[Work], logits: Tensor) -> None:
        """Draw, count, and hand out, from logits (W, V)."""
        drawing: list[tuple[Work, Live]] = []
        for work in works:
            if work.start < work.sequence.prompt_tokens:
                self._prompt_tokens += min(work.stop, work.sequence.prompt_tokens) - work.start
            if work.draws:
                drawing.append((work, self._live[work.sequence.id]))
            else:
                self._scheduler.advance(work, ())
        if not drawing:
            return
        owners, positions = [], []  # of each row
        for work, live in drawing:
            generated = live.generated
            owners.append(live)
            positions.append(generated)
            for ahead in range(len(work.draft)):
                owners.append(live)
                positions.append(generated + 1 + ahead)
        drawn = draw(owners, positions, logits)
        all_sound = all(drawn.sound)
        sound = [*drawn.sound, False]  # where looking for one ends
        row = 0
        for work, live in drawing:
            first, row = row, row + 1 + len(work.draft)
            if live in drawn.lost:
                self._end(live, drawn.lost[live])
                continue
            rows = range(first, row if all_sound else min(row, sound.index(False, first)))
            if not rows and work.draft:  # a wrong guess may be what is not finite: the next step goes without
                live.guessed = False
                continue
            if not rows:
                self._end(live, EngineError(_NOT_FINITE), damaged=True)
                continue
            live.sequence.sound = True
            tokens = accepted(live, work, rows, drawn)
            self._generated += len(tokens)
            self._drafted += len(work.draft)
            self._accepted_tokens += len(tokens) - 1
            self._scheduler.advance(work, [token.id for token in tokens])
            for token in tokens:
                self._outcome.items.append((live.request.id, token))
                if live.adjustment is not None:
                    live.adjustment.push(token.id)
            if tokens[-1].finish_reason is not None:
                self._forget(live)

    def _of(self, work: Work) -> Live:
        return self._live[work.sequence.id]

    def _end(self, live: Live, error: EngineError, *, damaged: bool = False) -> None:
        self._outcome.items.append((live.request.id, error))
        self._forget(live, damaged=damaged)

    def _forget(self, live: Live, *, damaged: bool = False) -> None:
        del self._live[live.request.id]
        self._embeds -= live.request.embed
        self._scheduler.remove(live.sequence, damaged=damaged)
        if self._drafter is not None:
            self._drafter.forget(live.request.id)
