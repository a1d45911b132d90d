"""The contract between whatever generates tokens and whatever asks for them: token ids in, token ids out.

Text (tokenizers, templates, stop strings) lives above this line, tensors live below it, and an
engine in another process or on another machine fits behind it as well as one on a thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from muster.errors import MusterError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token of one request is chosen, and when the request ends."""

    max_tokens: int
    """Tokens to generate at most; at least 1."""
    temperature: float = 1.0
    """0 takes the most likely token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    seed: int | None = None
    """Same seed, prompt and parameters: same draws, whatever else is being generated. None: any."""
    stop_ids: frozenset[int] = frozenset()
    """Token ids that end the request (end of sequence); such a token is still delivered."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many most likely ones; None: neither."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to continue. `prompt` holds at least one token id."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One generated token. Log-probabilities are those of the model, before temperature and filters."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, best first, as (token id, log-probability)."""
    finish_reason: FinishReason | None = None
    """Set on a request's last token: `stop` for one of its `stop_ids`, `length` for `max_tokens`."""


class Overloaded(MusterError):
    """The engine's queue is full; the same request may succeed after `retry_after_s`."""

    def __init__(self, waiting: int, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            f"the server is overloaded: {waiting} sequences are waiting already; retry in {retry_after_s} s"
        )


class EngineError(MusterError):
    """Generation failed inside the engine; other requests are not affected."""


class Engine(Protocol):
    """Generates tokens for many requests at once. Called from one asyncio event loop."""

    def submit(self, request: Request) -> AsyncIterator[Token]:
        """Queue `request` now and return its tokens as they come; raises Overloaded without queueing it.

        The iterator raises EngineError when generation fails, and ends early after `cancel`.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request and free what it holds within one step; unknown and finished ids are ignored."""
        ...

    def close(self) -> None:
        """Stop generating and free everything; running requests end with EngineError. Blocks until done."""
        ...
