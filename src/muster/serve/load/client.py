"""One streamed completion over HTTP/1.1, with the time of everything that arrives.

On h11 and plain sockets: a client that costs little is a client that measures the server, and not itself.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11

from muster.errors import MusterError, UsageError
from muster.serve.load.workload import Sent

_READ_BYTES = 1 << 16


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
        body = b""
        try:
            async with asyncio.timeout(self._timeout_s):
                async for event in self._exchange("GET", "/v1/models", b""):
                    if isinstance(event, h11.Data):
                        body += event.data
            return str(json.loads(body)["data"][0]["id"])
        except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MusterError(f"no answer from {self._url.geturl()} ({reason}): is it running?") from None
        except (ValueError, LookupError, TypeError):
            raise MusterError(
                f"{self._url.geturl()}/v1/models names no model: is it OpenAI-compatible?"
            ) from None

    async def complete(self, sent: Sent, model: str, due_s: float) -> Outcome:
        """Send one request now and read its answer to the end; whatever goes wrong is in the outcome."""
        outcome = Outcome(sent.number, due_s)
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
                await self._read(outcome, json.dumps(body).encode())
        except TimeoutError:
            outcome.error = f"no end within {self._timeout_s:g} s"
        except (OSError, ValueError, h11.RemoteProtocolError) as error:
            outcome.error = str(error) or type(error).__name__
        outcome.ended_s = time.perf_counter()
        return outcome

    async def _read(self, outcome: Outcome, body: bytes) -> None:
        rest = b""
        async for event in self._exchange("POST", "/v1/completions", body):
            if isinstance(event, h11.Response):
                outcome.status = event.status_code
                for name, value in event.headers:
                    if name == b"retry-after":
                        outcome.retry_after_s = float(value)
            elif isinstance(event, h11.Data):
                *lines, rest = (rest + bytes(event.data)).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        _take(outcome, line.removeprefix(b"data:").strip())
        if outcome.status != 200:
            outcome.error = rest.decode(errors="replace")[:200] or f"status {outcome.status}"

    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[h11.Event]:
        url = self._url
        secure = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if secure else 80)
        reader, writer = await asyncio.open_connection(url.hostname, port, ssl=secure)
        try:
            connection = h11.Connection(h11.CLIENT)
            headers = [*self._headers, ("Content-Length", str(len(body)))]
            request = h11.Request(method=method, target=url.path + path, headers=headers)
            writer.write((connection.send(request) or b"") + (connection.send(h11.Data(data=body)) or b""))
            connection.send(h11.EndOfMessage())
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    received = await reader.read(_READ_BYTES)
                    if not received and connection.their_state is h11.SEND_RESPONSE:
                        raise ConnectionResetError("the server closed the connection before it answered")
                    connection.receive_data(received)
                    continue
                assert isinstance(event, h11.Event)
                yield event
                if isinstance(event, h11.EndOfMessage):
                    return
        finally:
            writer.close()


def _take(outcome: Outcome, payload: bytes) -> None:
    """One server-sent event."""
    now = time.perf_counter()
    if payload == b"[DONE]":
        return
    content: dict[str, Any] = json.loads(payload)
    if "error" in content:
        outcome.error = str(content["error"])
    if usage := content.get("usage"):
        outcome.prompt_tokens = int(usage["prompt_tokens"])
        outcome.output_tokens = int(usage["completion_tokens"])
    if any("text" in choice and choice["text"] is not None for choice in content.get("choices") or ()):
        outcome.arrived_s.append(now)
