"""The contract between whatever generates tokens and whatever asks for them: token ids in, token ids out.

Text (tokenizers, templates, stop strings) lives above this line, tensors live below it, and an
engine in another process or on another machine fits behind it as well as one on a thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from muster.errors import MusterError, UsageError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Guide:
    """What the generated text must be: a JSON value of a schema, a match of a regular expression, or a choice."""

    kind: Literal["json", "regex", "choice"]
    text: str
    """JSON: a JSON schema. regex: the expression. choice: a JSON list of strings."""


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
    min_p: float = 0.0
    """Keep tokens at least this likely in proportion to the most likely one."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and the answer become less likely above 1: their logits are divided, or multiplied
    where negative, by it (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has, for each time."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    seed: int | None = None
    """Same seed, prompt and parameters: same draws, whatever else is being generated. None: any."""
    stop_ids: frozenset[int] = frozenset()
    """Token ids that end the request (end of sequence); such a token is still delivered."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many most likely ones; None: neither."""
    guide: Guide | None = None
    """What the text must be; the request ends where it is complete."""

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out before the draw."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalized(self) -> bool:
        """Whether a draw depends on the tokens drawn before it."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One sequence to continue. `prompt` holds at least one token id."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    """Smaller goes first."""
    client: str = ""
    """Who asks: within a priority, clients are served alike."""
    generated: tuple[int, ...] = ()
    """What another engine has generated already: fewer than `max_tokens` ids, which come first and are not
    delivered again. What follows is what that engine would have gone on with, draws included if a seed is given."""
    adapter: str = ""
    """Name of the adapter that computes it; none is the model alone."""
    embed: bool = False
    """Deliver, instead of tokens, one that carries the prompt's embedding."""

    def check(self, context_tokens: int) -> None:
        """Raise UsageError for what cannot be generated in that context."""
        prompt, done, most = len(self.prompt), len(self.generated), self.params.max_tokens
        if not prompt:
            raise UsageError("a prompt needs a token to go on from")
        if done and done >= most:
            raise UsageError(f"{done} of {most} tokens are generated already: nothing is left")
        if prompt + most > context_tokens:
            raise UsageError(
                f"{prompt} tokens of prompt and {most} to generate exceed the context of {context_tokens}"
            )


@dataclass(kw_only=True, slots=True)  # and not frozen, which would triple the cost of making one
class Token:
    """One generated token. Log-probabilities are those of the model, before temperature and filters."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, best first, as (token id, log-probability)."""
    finish_reason: FinishReason | None = None
    """Set on a request's last token: `stop` for one of its `stop_ids`, `length` for `max_tokens`."""
    embedding: tuple[float, ...] = ()
    """The model's last hidden state of the prompt's last token, of length 1 (E numbers)."""


class Overloaded(MusterError):
    """The engine's queue is full; the same request may succeed after `retry_after_s`."""

    def __init__(self, waiting: int, tokens: int = 0, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        with_tokens = f" with {tokens} prompt tokens" if tokens else ""
        super().__init__(
            f"the server is overloaded: {waiting} sequences{with_tokens} are waiting already; "
            f"retry in {retry_after_s} s"
        )


class EngineError(MusterError):
    """Generation failed inside the engine; other requests are not affected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """What an engine is doing, and has done since it started."""

    ready: bool = True
    """Not while it is being started again."""
    running: int = 0
    waiting: int = 0
    blocks: int = 0
    """Blocks of the key-value cache."""
    used_blocks: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_query_tokens: int = 0
    """Tokens looked up in the prefix cache,"""
    prefix_hit_tokens: int = 0
    """and found there."""
    preemptions: int = 0
    draft_tokens: int = 0
    """Guesses at next tokens,"""
    accepted_tokens: int = 0
    """and those that were right."""
    weights_step: int = 0
    """Training steps behind the weights; 0 where unknown."""


class Tokens(Protocol):
    """A request's tokens as they come, for who waits for each of them, or is told of them.

    Raises EngineError when generation fails, and ends early after `cancel`.
    """

    told: Callable[[], None]
    """Called on the event loop when there is something to take."""
    ended: bool
    """Nothing more will come."""

    def take(self) -> Sequence[Token]:
        """What has come since it was last asked for."""
        ...

    def __aiter__(self) -> AsyncIterator[Token]: ...

    async def __anext__(self) -> Token: ...


class Engine(Protocol):
    """Generates tokens for many requests at once. Called from one asyncio event loop."""

    def submit(self, request: Request) -> Tokens:
        """Queue `request` now and return its tokens as they come; raises Overloaded without queueing it."""
        ...

    def check(self) -> None:
        """Raise Overloaded if any request would be refused now: to be asked before tokenising it."""
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request and free what it holds within one step; unknown and finished ids are ignored."""
        ...

    def stats(self) -> Stats:
        """Figures of the moment."""
        ...

    def close(self) -> None:
        """Stop generating and free everything; running requests end with EngineError. Blocks until done."""
        ...
