"""Talking to a model from the command line: one in this process, or one behind an OpenAI-compatible server.

Both sides of `Partner` are synchronous, which is what a terminal needs.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import SplitResult, urlsplit

from muster.errors import MusterError, UsageError
from muster.serve.generation import Generation, Piece
from muster.serve.protocol import Request, SamplingParams
from muster.serve.template import PLAIN, Message

if TYPE_CHECKING:
    from muster.serve.opening import Opened

_REMOTE_TIMEOUT_S = 600.0
DEFAULT_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How answers are generated. `max_tokens` None: 256, or less where the context is small."""

    temperature: float = 0.7
    max_tokens: int | None = None


class Partner(Protocol):
    """A model to talk to."""

    model_id: str
    chats: bool
    """Whether the model has a chat template; one without continues text."""

    def say(self, prompt: str | Sequence[Message], manner: Manner) -> Iterator[str]:
        """The answer to messages, or the continuation of a text, piece by piece. Raises MusterError."""
        ...

    def close(self) -> None: ...


class LocalPartner:
    """A model in this process. Owns the engine of `opened`."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._runner = asyncio.Runner()
        self.model_id = opened.model_id
        self.chats = opened.codec.template is not PLAIN

    def say(self, prompt: str | Sequence[Message], manner: Manner) -> Iterator[str]:
        codec, context = self._opened.codec, self._opened.context_tokens
        ids = codec.encode(prompt) if isinstance(prompt, str) else codec.encode_chat(prompt)
        room = context - len(ids)
        if not ids or room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens, but the model's context is {context}: start afresh"
            )
        params = SamplingParams(
            max_tokens=min(manner.max_tokens or DEFAULT_TOKENS, room),
            temperature=manner.temperature,
            stop_ids=codec.eos_ids,
        )
        request = Request(id=uuid.uuid4().hex, prompt=ids, params=params)
        stop = () if isinstance(prompt, str) else codec.template.stop

        async def start() -> Generation:  # the engine wants a running loop
            return Generation(self._opened.engine, codec.decode, request, stop)

        generation = self._runner.run(start())
        pieces = generation.pieces()
        try:
            while (piece := self._runner.run(_next(pieces))) is not None:
                yield piece.text
        finally:
            generation.close()
            self._runner.run(pieces.aclose())

    def close(self) -> None:
        self._opened.engine.close()
        self._runner.close()


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


class RemotePartner:
    """The first model of an OpenAI-compatible server at `url` (with or without /v1); a key is taken from
    OPENAI_API_KEY."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url.rstrip("/").removesuffix("/v1"))
        if not self._url.hostname:
            raise UsageError(f"{url} is no address of a server: write http://127.0.0.1:8000")
        with self._request("GET", "/v1/models") as response:
            cards = _json(response.read()).get("data") or []
        if not cards:
            raise UsageError(f"the server at {url} serves no model")
        self.model_id = str(cards[0]["id"])
        self.chats = bool(cards[0].get("chat_template", True))  # muster's extension; others do chat
        self._default_tokens = min(DEFAULT_TOKENS, int(cards[0].get("max_model_len") or 4096) // 2)

    def say(self, prompt: str | Sequence[Message], manner: Manner) -> Iterator[str]:
        fields: dict[str, Any] = {
            "model": self.model_id,
            "stream": True,
            "temperature": manner.temperature,
            "max_tokens": manner.max_tokens or self._default_tokens,
        }
        if isinstance(prompt, str):
            path, fields["prompt"] = "/v1/completions", prompt
        else:
            path, fields["messages"] = "/v1/chat/completions", [dict(message) for message in prompt]
        with self._request("POST", path, fields) as response:
            for event in _events(response):
                if "error" in event:
                    raise MusterError(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices", []):
                    yield choice.get("text") or choice.get("delta", {}).get("content") or ""

    def close(self) -> None:
        pass  # a connection lasts one request

    def _request(
        self, method: str, path: str, fields: dict[str, Any] | None = None
    ) -> closing[http.client.HTTPResponse]:
        connection = _connection(self._url)
        body = None if fields is None else json.dumps(fields).encode()
        try:
            headers = {"Content-Type": "application/json", "Connection": "close"}
            if key := os.environ.get("OPENAI_API_KEY"):
                headers["Authorization"] = f"Bearer {key}"
            connection.request(method, self._url.path + path, body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or error
            raise MusterError(
                f"no answer from {self._url.geturl()} ({reason}): start one with muster serve"
            ) from None
        if response.status != 200:
            with closing(response):
                failure = _json(response.read()).get("error") or {}
            raise MusterError(str(failure.get("message") or f"the server answered {response.status}"))
        return closing(response)


def _connection(url: SplitResult) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname or "", url.port, timeout=_REMOTE_TIMEOUT_S)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON payloads of server-sent events, up to [DONE]."""
    for line in response:
        payload = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not payload:
            continue
        if payload == b"[DONE]":
            return
        yield _json(payload)


def _json(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise MusterError("the server's answer is not what an OpenAI-compatible server sends")
    return content
