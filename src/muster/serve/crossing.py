"""The one narrow place where the asyncio event loop and an engine's thread meet.

Requests go one way through a guarded queue, tokens the other way through one wake-up of the loop a
step. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence

from muster.serve.protocol import EngineError, Overloaded, Request, Token


class Stream:
    """One request's tokens on the event loop's side. None in the queue is the end."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[Token | EngineError | None] = asyncio.Queue()

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


Delivery = tuple[Stream, Token | EngineError]


class Crossing:
    """A bounded queue of requests towards the thread, and their tokens back."""

    def __init__(self, waiting_limit: int) -> None:
        self._waiting_limit = waiting_limit
        self._live: dict[str, Stream] = {}  # touched on the event loop only
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Stream] = deque()
        self._cancelled: set[str] = set()
        self._closing = False

    # Called on the event loop.

    def submit(self, request: Request) -> Stream:
        stream = Stream(request)
        with self._changed:
            if self._closing:
                raise EngineError("the engine is stopping")
            if len(self._waiting) >= self._waiting_limit:
                raise Overloaded(len(self._waiting))
            self._waiting.append(stream)
            self._changed.notify()
        self._live[request.id] = stream
        return stream

    def cancel(self, request_id: str) -> None:
        stream = self._live.pop(request_id, None)
        if stream is None:
            return
        stream.arrived.put_nowait(None)
        with self._changed:
            if stream in self._waiting:
                self._waiting.remove(stream)
            else:
                self._cancelled.add(request_id)
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()

    def _hand_out(self, deliveries: Sequence[Delivery]) -> None:
        for stream, item in deliveries:
            stream.arrived.put_nowait(item)
            if isinstance(item, EngineError) or item.finish_reason is not None:
                stream.arrived.put_nowait(None)
                self._live.pop(stream.request.id, None)

    # Called on the engine's thread.

    def wait(self, busy: bool) -> bool:
        """Block until there is something to do; False when the engine is to stop."""
        with self._changed:
            while not (busy or self._waiting or self._cancelled or self._closing):
                self._changed.wait()
            return not self._closing

    def take_cancelled(self) -> set[str]:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            return cancelled

    def waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    def take_waiting(self) -> Stream | None:
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """Hand a step's results over, with one wake-up of the event loop for all of them."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
        for delivery in deliveries:
            by_loop.setdefault(delivery[0].loop, []).append(delivery)
        for loop, items in by_loop.items():
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody is left to read
                loop.call_soon_threadsafe(self._hand_out, items)
