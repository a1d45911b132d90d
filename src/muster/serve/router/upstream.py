"""HTTP/1.1 to one server over connections that are kept: what is sent, and what comes back piece by piece.

What a client has sent was checked by the server that it reached; what a replica sends is read by `reply.py`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from muster.errors import MusterError, UsageError
from muster.serve.router.reply import BadReply, Reply

CONNECT_S = 3.0
"""Longest time for a connection to come about."""
_IDLE_CONNECTIONS = 64
_READ_BYTES = 1 << 16

Headers = Sequence[tuple[bytes, bytes]]


class Gone(MusterError):
    """The server cannot be reached, or has closed a connection before its answer's end."""

    def __init__(self, message: str, *, had_it: bool = True) -> None:
        super().__init__(message)
        self.had_it = had_it
        """Whether the request may have got there."""


@dataclass(slots=True, eq=False)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    reply: Reply
    """To the request that it carries."""
    used: bool = False


class Exchange:
    """A request whose answer has begun. Iterate over `pieces()`, then `close()`, which cuts an unfinished one."""

    def __init__(self, upstream: Upstream, connection: _Connection) -> None:
        self._reply = connection.reply
        self.status = self._reply.status
        self.headers: Headers = self._reply.headers
        self._upstream, self._connection = upstream, connection

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream of events."""
        kind = next((value for name, value in self.headers if name == b"content-type"), b"")
        return kind.startswith(b"text/event-stream")

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it comes; raises Gone when it is cut."""
        while True:
            if piece := self._reply.take():
                yield piece
            if self._reply.ended:
                return
            await self._upstream.receive(self._connection)

    async def begun(self) -> None:
        """Until the body's first piece is there; raises Gone."""
        while not self._reply.shows:
            await self._upstream.receive(self._connection)

    async def whole(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        self._upstream.release(self._connection)


class Upstream:
    """A server by its address (with or without /v1)."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url.rstrip("/").removesuffix("/v1"))
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise UsageError(f"{url} is no address of a server: write http://127.0.0.1:8000")
        self.url = parts.geturl()
        self._host, self._base = parts.hostname, parts.path
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._ssl else 80)
        self._authority = parts.netloc.rpartition("@")[2].encode()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    async def send(self, method: str, target: str, headers: Headers, body: bytes) -> Exchange:
        """Send a request; returns when its answer's header is there. Raises Gone.

        A kept connection may have been closed meanwhile by the other end; then the request is sent again on another.
        """
        had_it = False
        while True:
            connection = self._idle.pop() if self._idle else await self._connect(had_it)
            self._busy.add(connection)
            try:
                return await self._sent(connection, method, target, headers, body)
            except Gone:
                self.release(connection)
                if not connection.used:
                    raise
                had_it = True
            except BaseException:
                self.release(connection)
                raise

    def abort(self) -> None:
        """Cut all connections, as the server is taken for dead: whoever waits for it gets Gone."""
        for connection in [*self._idle, *self._busy]:
            connection.writer.transport.abort()
        self._idle.clear()

    async def receive(self, connection: _Connection) -> None:
        """Wait for more of an answer; raises Gone."""
        try:
            connection.reply.feed(await connection.reader.read(_READ_BYTES))
        except (OSError, BadReply) as error:
            raise Gone(f"{self.url} broke off its answer: {error}") from None

    def release(self, connection: _Connection) -> None:
        """An exchange has ended; unknown connections are ignored."""
        if connection not in self._busy:
            return
        self._busy.remove(connection)
        kept = connection.reply.ended and connection.reply.reusable
        if kept and len(self._idle) < _IDLE_CONNECTIONS and not connection.reader.at_eof():
            connection.used = True
            self._idle.append(connection)
        else:
            connection.writer.transport.abort()

    async def _connect(self, had_it: bool) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._ssl)
        except (OSError, TimeoutError) as error:
            reason = getattr(error, "strerror", None) or f"no connection within {CONNECT_S:g} s"
            raise Gone(f"{self.url} cannot be reached: {reason}", had_it=had_it) from None
        return _Connection(reader, writer, Reply(""))

    async def _sent(
        self, connection: _Connection, method: str, target: str, headers: Headers, body: bytes
    ) -> Exchange:
        reply = connection.reply = Reply(method)
        sent = [(b"host", self._authority), *headers, (b"content-length", b"%d" % len(body))]
        lines = [f"{method} {self._base}{target} HTTP/1.1".encode(), *(b"%b: %b" % pair for pair in sent)]
        head = b"\r\n".join(lines)
        if head.count(b"\n") != len(sent) or head.count(b"\r") != len(sent):
            raise ValueError("the request cannot be passed on: a line of it is two")
        connection.writer.write(b"%b\r\n\r\n%b" % (head, body))
        while not reply.begun:
            await self.receive(connection)
        return Exchange(self, connection)
