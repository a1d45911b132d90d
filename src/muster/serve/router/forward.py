"""One request's way: to a replica, its answer back, and on at another when that one dies.

Whatever the client has not seen can be asked for again, as answers depend on body and seed alone. A stream of which
it has seen a part goes on from there at a replica that knows how (`serve/relay.py`); at others it ends with an error.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial

from muster.serve.connection import event
from muster.serve.failures import error_body
from muster.serve.router.asked import Asked
from muster.serve.router.fleet import Attempt, Fleet, Replica
from muster.serve.router.handover import is_worth_it
from muster.serve.router.hedge import race
from muster.serve.router.trail import Trail
from muster.serve.router.upstream import Exchange, Gone, Headers

_LOG = logging.getLogger(__name__)

WAIT_S = 30.0
"""Longest time without a replica before a request is given up: a dead one has started again by then."""
DEATHS = 3
"""Replicas that may die under one request: it may be what kills them."""
RETRIED = frozenset({429, 500, 502, 503, 504})
"""Statuses that another replica may answer better."""
_OF_THE_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-connection te trailer transfer-encoding upgrade".split()
)
_NOT_SENT_ON = _OF_THE_CONNECTION | frozenset(b"host content-length expect accept-encoding".split())
_NOT_SENT_BACK = _OF_THE_CONNECTION | frozenset(b"content-length date server x-request-id".split())

Begin = Callable[[int, Headers], Awaitable[None]]
Write = Callable[[bytes], Awaitable[None]]


@dataclass(kw_only=True, slots=True)
class Incoming:
    """A client's request, and where its answer goes."""

    method: str
    target: str
    headers: Headers
    asked: Asked
    begin: Begin
    write: Write
    begun: bool = False
    """Whether the client has got a part of the answer."""
    trail: Trail | None = None
    avoided: set[int] = field(default_factory=set)
    deaths: int = 0
    tokens: int = 0
    until_s: float = 0.0
    """When it is given up, if no replica takes it."""
    relays: bool = False
    """Whether the replica that answers knows how to go on elsewhere."""


async def forward(incoming: Incoming, fleet: Fleet) -> None:
    """Answer a request, come what may."""
    fleet.budget.arrived()
    asked = incoming.asked
    if asked.streams:
        prefix = "cmpl" if incoming.target.startswith("/v1/completions") else "chatcmpl"
        incoming.trail = Trail(f"{prefix}-{secrets.token_hex(16)}", int(time.time()))
    incoming.until_s = time.monotonic() + WAIT_S
    while True:
        known = fleet.prefixes.matched(asked.keys) if fleet.carrier is not None else {}
        replica = fleet.choose(asked, incoming.avoided, relaying=incoming.begun)
        if replica is None:
            if time.monotonic() > incoming.until_s:
                await _fail(incoming, 503, "no replica is ready; retry later")
                return
            await fleet.wait()
            continue
        if fleet.carrier is not None and is_worth_it(asked, known.get(replica.index, 0.0)):
            await fleet.carrier.carry(fleet, incoming, replica)
        try:
            with ExitStack() as attempts:
                if await _attempt(incoming, fleet, replica, attempts):
                    return
        except Gone:
            if incoming.begun and not incoming.relays:
                await _fail(
                    incoming, 502, "the server died, and its kind cannot go on elsewhere: send it again"
                )
                return
            if incoming.deaths >= DEATHS:
                await _fail(incoming, 502, f"{DEATHS} replicas died with this request")
                return


async def _attempt(incoming: Incoming, fleet: Fleet, replica: Replica, attempts: ExitStack) -> bool:
    """Try one replica, or two of which the faster counts; whether the client has its answer. Raises Gone."""
    attempt = attempts.enter_context(fleet.attempt(replica, incoming.asked, incoming.tokens))
    if fleet.hedging.on and _may_hedge(incoming, replica):
        attempt, exchange = await _hedged(incoming, fleet, attempt, attempts)
    else:
        exchange = await _open(incoming, fleet, attempt)
    incoming.relays = bool(attempt.replica.relays)
    try:
        refused = _is_refused(exchange) or (incoming.begun and exchange.status >= 400)
        if refused and await _may_retry(incoming, fleet, attempt, exchange):
            return False
        attempt.succeeded() if exchange.status < 500 else attempt.failed()
        if exchange.status == 200 and exchange.streams:
            return await _stream(
                incoming, fleet, attempt, exchange, incoming.trail if incoming.relays else None
            )
        content = await exchange.whole()
        attempt.delivered(incoming.asked.output_tokens)
        if incoming.begun:
            await _fail(incoming, 502, "no other replica could go on with the answer")
            return True
        await _begin(incoming, exchange, (b"content-length", str(len(content)).encode()))
        await incoming.write(content)
        return True
    except Gone as gone:
        _died(incoming, fleet, attempt.replica, gone)
        raise
    finally:
        exchange.close()


async def _open(incoming: Incoming, fleet: Fleet, attempt: Attempt, *, begun: bool = False) -> Exchange:
    """Send the request; returns when the answer's header is there or, for `begun`, something of its body."""
    asked, trail, replica = incoming.asked, incoming.trail, attempt.replica
    body = asked.body
    if asked.generates and replica.relays:
        body = asked.with_fields(relay=trail.relay) if trail is not None else asked.with_fields()
    exchange: Exchange | None = None
    try:
        exchange = await attempt.upstream.send(incoming.method, incoming.target, incoming.headers, body)
        if begun:
            await exchange.begun()
        return exchange
    except BaseException as error:
        if exchange is not None:
            exchange.close()
        if isinstance(error, Gone):
            _died(incoming, fleet, replica, error)
        raise


async def _hedged(
    incoming: Incoming, fleet: Fleet, attempt: Attempt, attempts: ExitStack
) -> tuple[Attempt, Exchange]:
    """The answer that begins first, of one replica or of two."""

    def second() -> Attempt | None:
        avoided = {*incoming.avoided, attempt.replica.index}
        other = fleet.choose(incoming.asked, avoided)
        if other is None or other.index in avoided or not _may_hedge(incoming, other):
            return None
        if not fleet.budget.take():  # where all are slow, twice the work would make them slower
            return None
        return attempts.enter_context(fleet.attempt(other, incoming.asked, incoming.tokens))

    opening = partial(_open, incoming, fleet, begun=True)
    return await race(attempt, opening, second, fleet.hedging, _is_refused)


def _may_hedge(incoming: Incoming, replica: Replica) -> bool:
    """Whether two replicas would say the same, as all draws have a seed, and nothing has been said yet."""
    seeded = incoming.asked.seed is None or bool(replica.relays)
    return incoming.asked.streams and seeded and not incoming.begun and not incoming.tokens


def _died(incoming: Incoming, fleet: Fleet, replica: Replica, gone: Gone) -> None:
    _LOG.warning("%s", gone)
    incoming.avoided.add(replica.index)
    if gone.had_it:
        incoming.deaths += 1
        replica.deaths += 1
        fleet.failovers += 1
        incoming.until_s = time.monotonic() + WAIT_S


def _is_refused(exchange: Exchange) -> bool:
    return exchange.status in RETRIED


async def _may_retry(incoming: Incoming, fleet: Fleet, attempt: Attempt, exchange: Exchange) -> bool:
    """Whether a refusal is tried elsewhere: where somebody else is left, and the budget allows it. An answer that
    has begun is worth waiting for."""
    incoming.avoided.add(attempt.replica.index)
    others = [one for one in fleet.replicas if one.ready and one.index not in incoming.avoided]
    if incoming.begun:
        if time.monotonic() > incoming.until_s:
            return False
        if not others:
            await fleet.wait()
    elif not others or not fleet.budget.take():
        return False
    if exchange.status >= 500:
        attempt.failed()
    fleet.retries += 1
    return True


async def _stream(
    incoming: Incoming, fleet: Fleet, attempt: Attempt, exchange: Exchange, trail: Trail | None
) -> bool:
    """Pass a stream on as it comes; whether it came to its end."""
    if trail is not None:
        trail.restart()
    async with aclosing(exchange.pieces()) as pieces:
        async for piece in pieces:
            if trail is None:
                attempt.delivered(piece.count(b"\ndata:") + piece.startswith(b"data:"))
            else:
                piece = trail.feed(piece)
                incoming.tokens += trail.new_tokens
                attempt.delivered(trail.new_tokens)
                if trail.lost and incoming.deaths < DEATHS - 1 and fleet.budget.take():
                    attempt.failed()
                    incoming.deaths += 1
                    incoming.avoided.add(attempt.replica.index)
                    fleet.failovers += 1
                    return False
            if piece:
                await _show(incoming, exchange, piece)
    await _show(incoming, exchange, trail.end() if trail is not None else b"")
    return True


async def _show(incoming: Incoming, exchange: Exchange, piece: bytes) -> None:
    if not incoming.begun:  # so late, so that until then the request can start anew
        await _begin(incoming, exchange)
    await incoming.write(piece)


async def _begin(incoming: Incoming, exchange: Exchange, *more: tuple[bytes, bytes]) -> None:
    incoming.begun = True
    headers = [(name, value) for name, value in exchange.headers if name.lower() not in _NOT_SENT_BACK]
    await incoming.begin(exchange.status, [*headers, *more])


async def _fail(incoming: Incoming, status: int, message: str) -> None:
    """Tell the client: by a status, or by an event where a stream has begun."""
    content = error_body(status, message)
    if incoming.begun:
        await incoming.write(event(content))
        return
    await incoming.begin(status, [(b"content-type", b"application/json"), (b"retry-after", b"1")])
    await incoming.write(event(content).removeprefix(b"data: ").rstrip())


def sent_on(headers: Headers) -> Headers:
    """A client's headers as a replica gets them."""
    return [(name, value) for name, value in headers if name not in _NOT_SENT_ON]


def named(headers: Headers, request_id: bytes) -> Headers:
    """Headers with a request's id, which they may have already."""
    known = any(name.lower() == b"x-request-id" for name, _ in headers)
    return headers if known else [*headers, (b"x-request-id", request_id)]
