"""The one narrow place where the asyncio event loop meets whatever generates: a thread, or another process.

Requests go one way through an inbox, tokens the other way through one wake-up of the loop a step. Knows nothing of
models.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from muster.serve.protocol import EngineError, Overloaded, Request, Token

Item = Token | EngineError


class Stream:
    """One request's tokens on the event loop's side. None in the queue is the end."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[Item | None] = asyncio.Queue()
        self.dropped = False

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        item = await self.arrived.get()
        if isinstance(item, Token):
            return item
        self.arrived.put_nowait(None)  # whoever asks again gets the end again
        if item is None:
            raise StopAsyncIteration
        raise item


class Streams:
    """The requests that are being answered, a bounded number of which wait for their first step.

    A request is refused when `waiting_limit` others wait, or others whose prompts together with its own exceed
    `waiting_tokens`. Threads may call everything here but `open` and `drop`.
    """

    def __init__(self, waiting_limit: int, waiting_tokens: int) -> None:
        self._waiting_limit, self._waiting_tokens = waiting_limit, waiting_tokens
        self._changed = threading.Lock()  # guards what follows
        self._live: dict[str, Stream] = {}
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
            if self._refusal is not None:
                raise EngineError(self._refusal)
            full = len(self._waiting) >= self._waiting_limit
            if full or (self._waiting and self._tokens + tokens > self._waiting_tokens):
                raise Overloaded(len(self._waiting), self._tokens)
            stream = self._live[request.id] = Stream(request)
            self._waiting[request.id] = tokens
            self._tokens += tokens
        return stream

    def drop(self, request_id: str) -> bool:
        """End a stream; False when it has ended already."""
        with self._changed:
            stream = self._live.pop(request_id, None)
            self._admit(request_id)
        if stream is not None:
            stream.dropped = True
            stream.arrived.put_nowait(None)
        return stream is not None

    def deliver(self, items: Sequence[tuple[str, Item]], admitted: Sequence[str] = ()) -> None:
        """Hand a step's results over, with one wake-up of an event loop for all of them."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}
        with self._changed:
            for request_id in admitted:
                self._admit(request_id)
            for request_id, item in items:
                stream = self._live.get(request_id)
                if stream is None:  # dropped meanwhile
                    continue
                by_loop.setdefault(stream.loop, []).append((stream, item))
                if isinstance(item, EngineError) or item.finish_reason is not None:
                    del self._live[request_id]
                    self._admit(request_id)
        for loop, ready in by_loop.items():
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody is left to read
                loop.call_soon_threadsafe(_hand_out, ready)

    def fail(self, reason: str, *, for_good: bool = True) -> None:
        """End all streams with EngineError; `for_good`: refuse further ones with it, too."""
        with self._changed:
            if for_good:
                self._refusal = reason
            live = list(self._live)
        self.deliver([(request_id, EngineError(reason)) for request_id in live])

    def _admit(self, request_id: str) -> None:
        self._tokens -= self._waiting.pop(request_id, 0)


def _hand_out(ready: Sequence[tuple[Stream, Item]]) -> None:
    for stream, item in ready:
        if stream.dropped:  # while this was on its way
            continue
        stream.arrived.put_nowait(item)
        if isinstance(item, EngineError) or item.finish_reason is not None:
            stream.arrived.put_nowait(None)


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
