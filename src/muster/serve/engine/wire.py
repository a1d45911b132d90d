"""Between the server's process and the engine's: requests and tokens as JSON, each message with its length in front.

Both ends are ours and of one version, yet nothing is executed that comes in (rule 7).
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import orjson

from muster.serve.crossing import Item, Outcome
from muster.serve.protocol import EngineError, Guide, Request, SamplingParams, Token

_LENGTH_BYTES = 8


class Wire:
    """One end of a connected socket. Any thread may send; one at a time receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()
        self._received = bytearray()
        self._whole: deque[dict[str, Any]] = deque()
        self.ended = False
        """Whether the other end is gone, and all that it has sent was received."""

    def fileno(self) -> int:
        """For whoever waits until there is something to receive; -1 once it is closed."""
        return self._sock.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; raises OSError when the other end is gone."""
        body = orjson.dumps(message)
        with self._sending:
            self._sock.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)

    def receive(self) -> Sequence[dict[str, Any]]:
        """What has come by now; nothing also at the end."""
        self._take()
        messages, self._whole = self._whole, deque()
        return messages

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the other end sends, until it is gone."""
        while True:
            while self._whole:
                yield self._whole.popleft()
            if self.ended:
                return
            # A thread that waits in recv is woken up whenever the other end has read something, too: by every step.
            there = select.poll()
            there.register(self._sock, select.POLLIN)
            there.poll()
            self._take()

    def _take(self) -> None:
        try:
            data = self._sock.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.ended = not data
        received, begin = self._received, _LENGTH_BYTES
        received += data
        while begin <= len(received):
            end = begin + int.from_bytes(received[begin - _LENGTH_BYTES : begin], "big")
            if end > len(received):
                break
            self._whole.append(orjson.loads(memoryview(received)[begin:end]))
            begin = end + _LENGTH_BYTES
        del received[: begin - _LENGTH_BYTES]

    def end(self) -> None:
        """End the connection; whoever waits for messages, here or there, wakes up."""
        with contextlib.suppress(OSError):  # the other end is gone already
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, and give its file back."""
        self.end()
        self._sock.close()


def from_request(request: Request) -> dict[str, Any]:
    params = {field.name: getattr(request.params, field.name) for field in fields(request.params)}
    params["stop_ids"] = list(request.params.stop_ids)
    return {field.name: getattr(request, field.name) for field in fields(request)} | {"params": params}


def to_request(plain: dict[str, Any]) -> Request:
    params = dict(plain["params"])
    guide = params["guide"]
    params["stop_ids"] = frozenset(params["stop_ids"])
    params["logit_bias"] = tuple((id, value) for id, value in params["logit_bias"])
    params["guide"] = None if guide is None else Guide(**guide)
    ids = {name: tuple(plain[name]) for name in ("prompt", "generated")}
    return Request(**plain | ids | {"params": SamplingParams(**params)})


def from_outcome(outcome: Outcome) -> dict[str, Any]:
    items = [(id, *_from_item(item)) for id, item in outcome.items]
    return {"items": items, "admitted": outcome.admitted, "stats": outcome.stats}


def to_items(plain: Sequence[Sequence[Any]]) -> list[tuple[str, Item]]:
    """The items of an outcome, from its message's."""
    return [(item[0], _to_item(*item[1:])) for item in plain]


def _from_item(item: Item) -> tuple[Any, ...]:
    if isinstance(item, EngineError):
        return (str(item),)
    if item.finish_reason is None and item.logprob is None and not item.embedding:
        return (item.id,)  # nearly all are so
    return item.id, item.logprob, item.top_logprobs, item.finish_reason, item.embedding


def _to_item(id: Any, *more: Any) -> Item:
    if not more:
        return Token(id=id) if isinstance(id, int) else EngineError(id)
    logprob, top, reason, embedding = more
    return Token(
        id=id,
        logprob=logprob,
        top_logprobs=tuple(map(tuple, top)),
        finish_reason=reason,
        embedding=tuple(embedding),
    )
