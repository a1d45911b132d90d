"""Between the server's process and the engine's: requests and tokens as JSON, each message with its length in front.

Both ends are ours and of one version, yet nothing is executed that comes in (rule 7).
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import orjson

from muster.serve.crossing import Item, Outcome
from muster.serve.protocol import EngineError, Guide, Request, SamplingParams, Stats, Token

_LENGTH_BYTES = 8


class Wire:
    """One end of a connected socket. Any thread may send; one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; raises OSError when the other end is gone."""
        body = orjson.dumps(message)
        with self._sending:
            self._sock.sendall(len(body).to_bytes(_LENGTH_BYTES, "big") + body)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the other end sends, until it is gone."""
        buffer = bytearray()
        needed = _LENGTH_BYTES
        while True:
            while len(buffer) < needed:
                try:
                    received = self._sock.recv(1 << 16)
                except OSError:
                    return
                if not received:
                    return
                buffer += received
            if needed == _LENGTH_BYTES:
                needed += int.from_bytes(buffer[:_LENGTH_BYTES], "big")
                continue
            yield orjson.loads(memoryview(buffer)[_LENGTH_BYTES:needed])
            del buffer[:needed]
            needed = _LENGTH_BYTES

    def close(self) -> None:
        """End the connection; whoever waits in `messages` wakes up."""
        with contextlib.suppress(OSError):  # the other end is gone already
            self._sock.shutdown(socket.SHUT_RDWR)
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
    items = [
        [id, str(item)]
        if isinstance(item, EngineError)
        else [id, item.id, item.logprob, item.top_logprobs, item.finish_reason, item.embedding]
        for id, item in outcome.items
    ]
    return {"items": items, "admitted": outcome.admitted, "stats": outcome.stats}


def to_outcome(plain: dict[str, Any]) -> Outcome:
    items = [(item[0], _to_item(item[1:])) for item in plain["items"]]
    return Outcome(items=items, admitted=plain["admitted"], stats=Stats(**plain["stats"]))


def _to_item(values: list[Any]) -> Item:
    if len(values) == 1:
        return EngineError(values[0])
    id, logprob, top, reason, embedding = values
    return Token(
        id=id,
        logprob=logprob,
        top_logprobs=tuple(map(tuple, top)),
        finish_reason=reason,
        embedding=tuple(embedding),
    )
