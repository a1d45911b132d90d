"""The one narrow place where the asyncio event loop meets whatever generates: a thread, or another process.

Requests go one way through an inbox, tokens the other way through one wake-up of the loop a step. Knows nothing of
models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from muster.serve.protocol import EngineError, Overloaded, Request, Stats, Token

Item = Token | EngineError

_LOG = logging.getLogger(__name__)

WAITING_LIMIT = 256
WAITING_TOKENS = 200_000
WAITING_S = 60.0
"""Longest time that a request shall wait; one that would is refused, and told when to come again."""


@dataclass(slots=True)
class Outcome:
    """What a step has come to."""

    items: list[tuple[str, Item]] = field(default_factory=list)
    """(request's id, its next token or why there is none), in order."""
    admitted: list[str] = field(default_factory=list)
    """Requests that wait no longer."""
    stats: Stats = field(default_factory=Stats)


class Stream:
    """One request's tokens on the event loop's side."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.told: Callable[[], None] = self._wake
        self.ended = False
        self._tokens: deque[Token] = deque()
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, items: Iterable[Item]) -> None:
        """What has arrived; nothing does after the end."""
        if self.ended:
            return
        for item in items:
            if isinstance(item, EngineError):
                self._error, self.ended = item, True
            else:
                self._tokens.append(item)
                self.ended = item.finish_reason is not None
        self.told()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def take(self) -> Sequence[Token]:
        if self._error is not None:
            raise self._error
        tokens = list(self._tokens)
        self._tokens.clear()
        return tokens

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self.ended:
                raise StopAsyncIteration
            self._waiter = self.loop.create_future()
            await self._waiter
        return self._tokens.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pace:
    """How long a request will wait, judged by how fast others got through a queue that did not end."""

    _KEPT, _ENOUGH = 0.98, 8

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s: float | None = None
        self._gap_s = self._weight = 0.0
        self._seen = 0

    def queued(self) -> None:
        """A request waits."""
        if self._last_s is None:
            self._last_s = self._clock()

    def admitted(self, *, others: bool) -> None:
        """One waits no longer, and there are `others` that do."""
        if self._last_s is None or not others:
            self._last_s = None
            return
        now_s = self._clock()
        self._gap_s = self._KEPT * self._gap_s + (1 - self._KEPT) * (now_s - self._last_s)
        self._weight = self._KEPT * self._weight + (1 - self._KEPT)
        self._last_s, self._seen = now_s, self._seen + 1

    def wait_s(self, waiting: int) -> float:
        """Expected time behind so many; 0 where it is not known."""
        return waiting * self._gap_s / self._weight if self._seen >= self._ENOUGH else 0.0


class Streams:
    """The requests that are being answered, a bounded number of which wait for their first step.

    A request is refused when `waiting_limit` others wait, or others whose prompts together with its own exceed
    `waiting_tokens`, or when it would be likely to wait longer than `waiting_s`. Threads may call everything here but
    `open` and `drop`.
    """

    def __init__(self, waiting_limit: int, waiting_tokens: int, waiting_s: float = WAITING_S) -> None:
        self._waiting_limit, self._waiting_tokens = waiting_limit, waiting_tokens
        self._waiting_s, self._pace = waiting_s, Pace()
        self._changed = threading.Lock()  # guards what follows
        self._live: dict[str, Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        """That of the streams."""
        self._waiting: dict[str, int] = {}  # prompt tokens of those not yet admitted
        self._tokens = 0
        self._refusal: str | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._live) - len(self._waiting)

    def open(self, request: Request) -> Stream:
        """A stream for a request that is to be queued now; raises Overloaded, or EngineError after `fail`."""
        tokens = len(request.prompt)
        with self._changed:
            self._check(tokens)
            stream = self._live[request.id] = Stream(request)
            self._loop = stream.loop
            self._waiting[request.id] = tokens
            self._tokens += tokens
            self._pace.queued()
        return stream

    def check(self) -> None:
        """Raise what `open` would, of the smallest request."""
        with self._changed:
            self._check(1)

    def drop(self, request_id: str) -> bool:
        """End a stream; False when it has ended already."""
        with self._changed:
            stream = self._live.pop(request_id, None)
            self._admit(request_id)
        if stream is not None:
            stream.end()
        return stream is not None

    def deliver(self, items: Sequence[tuple[str, Item]], admitted: Sequence[str] = ()) -> None:
        """Hand a step's results over: here, on the loop that runs, or with one wake-up of a loop for all of them."""
        ready: dict[Stream, list[Item]] = {}
        with self._changed:
            for request_id in admitted:
                self._admit(request_id)
            for request_id, item in items:
                stream = self._live.get(request_id)
                if stream is None:  # dropped meanwhile
                    continue
                ready.setdefault(stream, []).append(item)
                if isinstance(item, EngineError) or item.finish_reason is not None:
                    del self._live[request_id]
                    self._admit(request_id)
            loop = self._loop
        if not ready or loop is None:
            return
        if loop is _this_loop():
            _hand_out(ready)
            return
        with contextlib.suppress(RuntimeError):  # it is closed: nobody is left to read
            loop.call_soon_threadsafe(_hand_out, ready)

    def fail(self, reason: str, *, for_good: bool = True) -> None:
        """End all streams with EngineError; `for_good`: refuse further ones with it, too."""
        with self._changed:
            if for_good:
                self._refusal = reason
            live = list(self._live)
        self.deliver([(request_id, EngineError(reason)) for request_id in live])

    def _check(self, tokens: int) -> None:
        if self._refusal is not None:
            raise EngineError(self._refusal)
        waiting = len(self._waiting)
        wait_s = self._pace.wait_s(waiting)
        too_many = waiting >= self._waiting_limit or wait_s > self._waiting_s
        if too_many or (self._waiting and self._tokens + tokens > self._waiting_tokens):
            raise Overloaded(waiting, self._tokens, retry_after_s=max(1, math.ceil(wait_s)))

    def _admit(self, request_id: str) -> None:
        if request_id in self._waiting:
            self._tokens -= self._waiting.pop(request_id)
            self._pace.admitted(others=bool(self._waiting))


def _this_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None  # this is a thread without one


def _hand_out(ready: Mapping[Stream, Sequence[Item]]) -> None:
    for stream, items in ready.items():
        try:
            stream.put(items)
        except Exception as error:  # a fault of one who was told is not the others'
            _LOG.error("an answer failed", exc_info=error)


Command = Request | str | Callable[[], None]
"""A new request, the id of one to cancel, or what is to be done between two steps."""


class Inbox:
    """Commands on their way to the engine's thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commands: list[Command] = []
        self._closed = False

    def put(self, command: Command) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, *, wait: bool) -> list[Command] | None:
        """What has arrived, in order; blocks for it if it should `wait`. None when the engine is to stop."""
        with self._changed:
            while wait and not (self._commands or self._closed):
                self._changed.wait()
            commands, self._commands = self._commands, []
            return None if self._closed else commands
