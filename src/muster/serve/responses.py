"""Answers in the shapes of OpenAI's completions and chat API: whole, and as chunks of a stream."""

from __future__ import annotations

import struct
import uuid
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from muster.serve.detokenize import Decode
from muster.serve.protocol import FinishReason, Token
from muster.serve.tools import ToolCall, ToolReader

Json = dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """What one choice has come to so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    generated_tokens: int = 0
    finish_reason: FinishReason | None = None


class Shape(Protocol):
    """One endpoint's JSON. `head` is what all objects of one answer share."""

    def opening(self, index: int) -> Json | None:
        """The choice that starts a stream, before any text."""
        ...

    def delta(self, index: int, part: Outcome, offset: int) -> Json:
        """The choice of one chunk; `offset` counts the characters that came before."""
        ...

    def choice(self, index: int, outcome: Outcome) -> Json:
        """The choice of a whole answer."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionShape:
    """text_completion objects."""

    decode: Decode
    logprobs: bool = False
    echo: Sequence[str] = ()
    """Text to put in front of each choice."""

    def opening(self, index: int) -> Json | None:
        echoed = Outcome(text=self.echo[index]) if self.echo else None
        return self.delta(index, echoed, 0) if echoed else None

    def delta(self, index: int, part: Outcome, offset: int) -> Json:
        return {
            "index": index,
            "text": part.text,
            "logprobs": self._logprobs(part.tokens, offset) if self.logprobs else None,
            "finish_reason": part.finish_reason,
        }

    def choice(self, index: int, outcome: Outcome) -> Json:
        choice = self.delta(index, outcome, 0)
        if self.echo:
            choice["text"] = self.echo[index] + choice["text"]
        return choice

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Json:
        texts = [self.decode([token.id]) for token in tokens]
        offsets = [offset]
        for text in texts[:-1]:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.decode([id]): logprob for id, logprob in reversed(token.top_logprobs)}
                for token in tokens
            ],
            "text_offset": offsets[: len(texts)],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatShape:
    """chat.completion and chat.completion.chunk objects."""

    decode: Decode
    logprobs: bool = False

    def opening(self, index: int) -> Json | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, Outcome())

    def delta(self, index: int, part: Outcome, offset: int) -> Json:
        return self._chunk(index, {"content": part.text} if part.text else {}, part)

    def choice(self, index: int, outcome: Outcome) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": outcome.text, "refusal": None},
            "logprobs": self._logprobs(outcome.tokens),
            "finish_reason": outcome.finish_reason,
        }

    def _chunk(self, index: int, delta: Json, part: Outcome) -> Json:
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(part.tokens) if part.tokens else None,
            "finish_reason": part.finish_reason,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.logprobs:
            return None
        content = [
            self._entry(token.id, token.logprob)
            | {"top_logprobs": [self._entry(id, logprob) for id, logprob in token.top_logprobs]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id: int, logprob: float | None) -> Json:
        text = self.decode([id])
        # A token that is part of a character has no text of its own, and its bytes are not known here.
        known = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}


class ToolShape:
    """ChatShape's objects, whose text may hold calls of tools."""

    def __init__(self, chat: ChatShape, names: frozenset[str]) -> None:
        self._chat, self._names = chat, names
        self._readers: dict[int, ToolReader] = {}
        self._calls: dict[int, int] = {}
        """How many each choice has made."""

    def opening(self, index: int) -> Json | None:
        return self._chat.opening(index)

    def delta(self, index: int, part: Outcome, offset: int) -> Json:
        reader = self._readers.setdefault(index, ToolReader(self._names))
        found = reader.push(part.text)
        if part.finish_reason is not None:
            found += reader.flush()
        choice = self._chat.delta(index, replace(part, text="".join(_texts(found))), offset)
        first = self._calls.get(index, 0)
        made = [{"index": first + place} | _call(call) for place, call in enumerate(_calls(found))]
        if made:
            choice["delta"]["tool_calls"] = made
        self._calls[index] = first + len(made)
        if part.finish_reason == "stop" and self._calls[index]:
            choice["finish_reason"] = "tool_calls"
        return choice

    def choice(self, index: int, outcome: Outcome) -> Json:
        reader = ToolReader(self._names)
        found = reader.push(outcome.text) + reader.flush()
        choice = self._chat.choice(index, outcome)
        if made := [_call(call) for call in _calls(found)]:
            choice["message"] |= {"content": "".join(_texts(found)) or None, "tool_calls": made}
            if outcome.finish_reason == "stop":
                choice["finish_reason"] = "tool_calls"
        return choice


def _texts(found: Sequence[str | ToolCall]) -> list[str]:
    return [part for part in found if isinstance(part, str)]


def _calls(found: Sequence[str | ToolCall]) -> list[ToolCall]:
    return [part for part in found if isinstance(part, ToolCall)]


def _call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def embeddings(vectors: Sequence[Sequence[float]], model_id: str, prompt_tokens: int, base64: bool) -> Json:
    """The answer of /v1/embeddings; base64 is of little-endian fp32."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _packed(vector) if base64 else vector}
            for index, vector in enumerate(vectors)
        ],
        "model": model_id,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }


def _packed(vector: Sequence[float]) -> str:
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
