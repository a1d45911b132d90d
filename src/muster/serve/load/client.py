"""One streamed completion over HTTP/1.1, with the time of everything that arrives.

On h11 and plain sockets: a client that costs little is a client that measures the server, and not itself. What
arrives is only kept, with its time, and is read when the answer has ended: a server on the same cores has them until
then.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11

from muster.errors import MusterError, UsageError
from muster.serve.load.workload import Sent

_LAST_CHUNK = b"0\r\n\r\n"
_READ_AT_ONCE = 16
"""Pieces of an answer; what arrives of others meanwhile gets its time late."""


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are those of `time.perf_counter`."""

    number: int
    due_s: float
    """When it should have been sent: waiting in the client counts as waiting."""
    status: int = 0
    """Of the HTTP response; 0 where there was none."""
    error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """As the server counts them (`usage`)."""
    arrived_s: list[float] = field(default_factory=list)
    """Of each piece of text."""
    ended_s: float = 0.0
    retry_after_s: float | None = None

    @property
    def succeeded(self) -> bool:
        return self.status == 200 and not self.error and self.output_tokens > 0

    @property
    def is_refused(self) -> bool:
        """The server said that it has too much to do."""
        return self.status in (429, 503)

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.arrived_s[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.arrived_s[-1] - self.arrived_s[0]) / max(self.output_tokens - 1, 1)

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies, between pieces: of one token, or of several where a server sends them together."""
        return [later - earlier for earlier, later in pairwise(self.arrived_s)]


class Server:
    """An OpenAI-compatible server, by its address."""

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 600.0) -> None:
        self._url: SplitResult = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise UsageError(f"{url} is no address of a server: write http://127.0.0.1:8000")
        self._headers = [
            ("Host", self._url.netloc),
            ("Content-Type", "application/json"),
            ("Connection", "close"),
        ]
        if key is not None:
            self._headers.append(("Authorization", f"Bearer {key}"))
        self._timeout_s = timeout_s

    async def model(self) -> str:
        """The name of the first model that it serves."""
        arrival = _Arrival()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(arrival, "GET", "/v1/models", b"")
            data = [bytes(event.data) for _, event in arrival.events() if isinstance(event, h11.Data)]
            return str(json.loads(b"".join(data))["data"][0]["id"])
        except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MusterError(f"no answer from {self._url.geturl()} ({reason}): is it running?") from None
        except (ValueError, LookupError, TypeError):
            raise MusterError(
                f"{self._url.geturl()}/v1/models names no model: is it OpenAI-compatible?"
            ) from None

    async def complete(self, sent: Sent, model: str, due_s: float) -> Outcome:
        """Send one request now and read its answer to the end; whatever goes wrong is in the outcome."""
        outcome, arrival = Outcome(sent.number, due_s), _Arrival()
        body = {
            "model": model,
            "prompt": list(sent.prompt),
            "max_tokens": sent.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(arrival, "POST", "/v1/completions", json.dumps(body).encode())
        except TimeoutError:
            outcome.error = f"no end within {self._timeout_s:g} s"
        except OSError as error:
            outcome.error = str(error) or type(error).__name__
        outcome.ended_s = time.perf_counter()
        try:
            await _read(outcome, arrival)
        except (ValueError, h11.RemoteProtocolError) as error:
            outcome.error = outcome.error or str(error)
        return outcome

    async def _exchange(self, arrival: _Arrival, method: str, path: str, body: bytes) -> None:
        """Send a request, and wait for the end of what is answered."""
        url = self._url
        secure = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if secure else 80)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: arrival, url.hostname or "", port, ssl=secure)
        try:
            headers = [*self._headers, ("Content-Length", str(len(body)))]
            request = h11.Request(method=method, target=url.path + path, headers=headers)
            transport.write((h11.Connection(h11.CLIENT).send(request) or b"") + body)
            await arrival.ended
        finally:
            transport.close()
        if not arrival.pieces:
            raise ConnectionResetError("the server closed the connection before it answered")


class _Arrival(asyncio.Protocol):
    """What comes on a connection, which is for one answer."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        """With the time of each."""
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        if data.endswith(_LAST_CHUNK):
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def events(self) -> Iterator[tuple[float, h11.Event]]:
        """All of the answer, read now; raises h11.RemoteProtocolError, also where it is not whole."""
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method="GET", target="/", headers=[("Host", "")]))
        connection.send(h11.EndOfMessage())
        for at_s, data in [*self.pieces, (time.perf_counter(), b"")]:
            connection.receive_data(data)
            while (event := connection.next_event()) is not h11.NEED_DATA:
                assert isinstance(event, h11.Event)
                yield at_s, event
                if isinstance(event, h11.EndOfMessage):
                    return

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


async def _read(outcome: Outcome, arrival: _Arrival) -> None:
    rest = b""
    for number, (at_s, event) in enumerate(arrival.events()):
        if isinstance(event, h11.Response):
            outcome.status = event.status_code
            for name, value in event.headers:
                if name == b"retry-after":
                    outcome.retry_after_s = float(value)
        elif isinstance(event, h11.Data):
            *lines, rest = (rest + bytes(event.data)).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    _take(outcome, line.removeprefix(b"data:").strip(), at_s)
        if number % _READ_AT_ONCE == 0:
            await asyncio.sleep(0)
    if outcome.status != 200:
        outcome.error = outcome.error or rest.decode(errors="replace")[:200] or f"status {outcome.status}"


def _take(outcome: Outcome, payload: bytes, at_s: float) -> None:
    """One server-sent event."""
    if payload == b"[DONE]":
        return
    content: dict[str, Any] = json.loads(payload)
    if "error" in content:
        outcome.error = str(content["error"])
    if usage := content.get("usage"):
        outcome.prompt_tokens = int(usage["prompt_tokens"])
        outcome.output_tokens = int(usage["completion_tokens"])
    if any("text" in choice and choice["text"] is not None for choice in content.get("choices") or ()):
        outcome.arrived_s.append(at_s)
