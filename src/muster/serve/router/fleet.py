"""The replicas: what each is doing, whether it can be trusted, and which gets the next request.

Belongs to one event loop. `probe` says who answers, `supervise` where a replica of ours listens; requests come and go
as `Attempt`s.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from muster.serve.router.asked import Asked
from muster.serve.router.breaker import Breaker, RetryBudget
from muster.serve.router.handover import Carrier
from muster.serve.router.hedge import Hedging
from muster.serve.router.policy import Candidate, Policy, PrefixTable, choose
from muster.serve.router.rates import Meter, weights
from muster.serve.router.upstream import Gone, Upstream

LOOK_AGAIN_S = 0.25
"""Whoever waits for a replica looks again after so long at the latest, as breakers close by the clock."""


@dataclass(slots=True, eq=False)
class Replica:
    """A server behind the router."""

    index: int
    name: str
    for_prompts: bool = False
    """Computes others' prompts (`handover.py`); answers only where nobody else is left."""
    upstream: Upstream | None = None
    """None while it is not there."""
    ready: bool = False
    """Its last probe said so."""
    relays: bool | None = None
    """Whether it can go on with another's answers (`serve/relay.py`); None: not asked yet."""
    models: frozenset[str] = frozenset()
    """What it says that it serves; empty where it has not been asked, or does not say."""
    load: float = 0.0
    breaker: Breaker = field(default_factory=Breaker)
    meter: Meter = field(default_factory=Meter)
    requests: int = 0
    deaths: int = 0
    """Requests that it broke off."""
    poked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to have it probed now."""

    def came(self, upstream: Upstream) -> None:
        """It listens, perhaps as another process than before."""
        self.upstream, self.relays, self.breaker = upstream, None, Breaker()
        self.models = frozenset()
        self.poked.set()


class Attempt:
    """One request at one replica, and what it has still to do there."""

    def __init__(
        self, fleet: Fleet, replica: Replica, upstream: Upstream, asked: Asked, output: float
    ) -> None:
        self.replica, self.upstream = replica, upstream
        self._fleet, self._prompt, self._output = fleet, asked.prompt_cost, output
        self._settled = self._over = False
        replica.load += self._prompt + self._output
        replica.requests += 1
        replica.breaker.began()
        replica.meter.began(time.monotonic())

    def delivered(self, tokens: int) -> None:
        """Tokens have come; with the first, the prompt is done."""
        done = min(tokens, self._output)
        self._output -= done
        self.replica.load -= done + self._prompt
        self.replica.meter.delivered(tokens + self._prompt, time.monotonic())
        self._prompt = 0.0

    def succeeded(self) -> None:
        self._settled = True
        self.replica.breaker.succeeded()

    def failed(self) -> None:
        if self._over:
            return
        self._settled = True
        self.replica.breaker.failed(time.monotonic())

    def ended(self) -> None:
        """Nothing more comes; what is said of it later is not this attempt's."""
        if self._over:
            return
        self._over = True
        if not self._settled:
            self.replica.breaker.abandoned()
        self.replica.load -= self._prompt + self._output
        self.replica.meter.ended(time.monotonic())


class Fleet:
    """All replicas. `policy` chooses among those that are ready."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        policy: Policy,
        hedging: Hedging | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        self.replicas, self.policy = replicas, policy
        self.hedging, self.carrier = hedging or Hedging(), carrier
        self.budget = RetryBudget()
        self.prefixes = PrefixTable()
        self.failovers = self.retries = 0
        self._turn = 0
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        return any(replica.ready for replica in self.replicas)

    def changed(self) -> None:
        """A replica has become ready, or is gone: whoever waits looks again."""
        self._changed.set()

    def lost(self, replica: Replica) -> None:
        """A replica is dead: its requests go on elsewhere, and its cache is gone."""
        replica.ready = False
        self.prefixes.forget(replica.index)
        self.changed()
        if replica.upstream is not None:
            replica.upstream.abort()

    def choose(self, asked: Asked, avoided: set[int], *, relaying: bool = False) -> Replica | None:
        """The replica for a request, if any can take it; one of `avoided` only where there is no other. `relaying`:
        one that can go on with another's answer."""
        now_s = time.monotonic()
        able = [
            one
            for one in self.replicas
            if one.ready and one.breaker.allows(now_s) and (one.relays or not relaying)
        ]
        able = [one for one in able if not one.for_prompts] or able
        # Where nobody serves the model, whoever is asked says so.
        able = [one for one in able if not one.models or asked.model in one.models] or able
        able = [one for one in able if one.index not in avoided] or able
        if not able:
            return None
        rated = weights([one.meter.rate for one in able])
        candidates = [Candidate(one.index, one.load, weight) for one, weight in zip(able, rated, strict=True)]
        matched = self.prefixes.matched(asked.keys) if self.policy == "prefix" else {}
        self._turn += 1
        chosen = choose(self.policy, candidates, asked.cost, matched, self._turn)
        if self.policy == "prefix":
            self.prefixes.note(asked.keys, chosen)
        return self.replicas[chosen]

    def least_loaded_for_prompts(self, avoided: int) -> Replica | None:
        """The replica that computes the next prompt for another one."""
        now_s = time.monotonic()
        able = [
            one
            for one in self.replicas
            if one.for_prompts and one.ready and one.index != avoided and one.breaker.allows(now_s)
        ]
        return min(able, key=lambda one: one.load, default=None)

    async def wait(self) -> None:
        """Until something may have changed."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_AGAIN_S):
                await self._changed.wait()

    @contextlib.contextmanager
    def attempt(self, replica: Replica, asked: Asked, delivered_tokens: int) -> Iterator[Attempt]:
        """A request at a replica, of which others have delivered some tokens."""
        assert replica.upstream is not None
        left = max(1, asked.output_tokens - delivered_tokens)
        attempt = Attempt(self, replica, replica.upstream, asked, left)
        try:
            yield attempt
        except Gone:
            attempt.failed()
            raise
        finally:
            attempt.ended()
