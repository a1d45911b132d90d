"""From a valid body to work for the engine: tokenised, checked against the model's limits, counted.

What only the model can know is refused here (unknown ids, prompts beyond the context), in one
sentence with the figures.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from muster.errors import UsageError
from muster.serve.codec import TextCodec
from muster.serve.failures import RequestError
from muster.serve.fields import prompts_of
from muster.serve.keys import Client
from muster.serve.limits import Limits
from muster.serve.messages import ChatMessage, Tool
from muster.serve.protocol import Guide, Request, SamplingParams
from muster.serve.relay import Relay
from muster.serve.responses import ChatShape, CompletionShape, Shape, ToolShape
from muster.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest, SamplingFields
from muster.serve.template import TemplateRefused

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """An accepted body: one engine request a choice, and how to answer."""

    requests: Sequence[Request]
    stop: tuple[str, ...]
    shape: Shape
    object: str
    """OpenAI's name of the answer's kind."""
    stream: bool
    include_usage: bool
    prompt_tokens: int
    relay: Relay | None = None


def read_completion(
    body: CompletionRequest, codec: TextCodec, limits: Limits, client: Client, adapter: str = ""
) -> Job:
    """A completions body as a job; raises RequestError."""
    prompts = _encoded(body.prompts, body.n or 1, codec, limits, "prompt")
    requests = _requests(
        body,
        prompts,
        body.max_tokens,
        DEFAULT_COMPLETION_TOKENS,
        body.logprobs,
        codec,
        limits,
        client,
        adapter,
    )
    echo: list[str] = []
    if body.echo:
        texts = [item if isinstance(item, str) else codec.decode(item) for item in body.prompts]
        echo = [text for text in texts for _ in range(body.n or 1)]
    return Job(
        requests=requests,
        stop=body.stop_strings,
        shape=CompletionShape(decode=codec.decode, logprobs=body.logprobs is not None, echo=echo),
        object="text_completion",
        stream=bool(body.stream),
        include_usage=body.include_usage,
        prompt_tokens=sum(map(len, prompts)),
        relay=body.relay,
    )


def read_chat(body: ChatRequest, codec: TextCodec, limits: Limits, client: Client, adapter: str = "") -> Job:
    """A chat body as a job; raises RequestError."""
    _check_choices(1, body.n or 1, limits.choices)
    prompt = encode_messages(body.messages, body.offered, codec, limits)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    asked = body.max_completion_tokens or body.max_tokens
    requests = _requests(
        body, [prompt], asked, limits.context_tokens, logprobs, codec, limits, client, adapter
    )
    chat = ChatShape(decode=codec.decode, logprobs=logprobs is not None)
    names = frozenset(tool.function.name for tool in body.offered)
    return Job(
        requests=requests,
        stop=body.stop_strings + codec.template.stop,
        shape=ToolShape(chat, names) if names else chat,
        object="chat.completion",
        stream=bool(body.stream),
        include_usage=body.include_usage,
        prompt_tokens=len(prompt),
        relay=body.relay,
    )


def read_embedding(
    body: EmbeddingRequest, codec: TextCodec, limits: Limits, client: Client, adapter: str = ""
) -> list[Request]:
    """An embeddings body as work for the engine; raises RequestError."""
    prompts = _encoded(prompts_of(body.input), 1, codec, limits, "input")
    for prompt in prompts:
        if len(prompt) > limits.context_tokens:
            raise _too_long(f"has {len(prompt)}", limits.context_tokens, "input")
    who = _standing(client, body.user, body.priority, adapter)
    params = SamplingParams(max_tokens=0)
    return [
        Request(id=uuid.uuid4().hex, prompt=prompt, params=params, embed=True, **who) for prompt in prompts
    ]


def encode_messages(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], codec: TextCodec, limits: Limits
) -> tuple[int, ...]:
    """The prompt of a chat; raises RequestError."""
    if tools and not codec.template.takes_tools:
        raise RequestError(400, "this model's chat template knows no tools; leave them out", param="tools")
    _check_lengths(["".join(message.text for message in messages)], codec, limits.context_tokens, "messages")
    try:
        return codec.encode_chat([message.plain for message in messages], [tool.plain for tool in tools])
    except TemplateRefused as error:
        raise RequestError(400, str(error), param="messages") from None


def _encoded(
    items: Sequence[str | list[int]], n: int, codec: TextCodec, limits: Limits, param: str
) -> list[tuple[int, ...]]:
    _check_choices(len(items), n, limits.choices)
    texts = [item for item in items if isinstance(item, str)]
    _check_lengths(texts, codec, limits.context_tokens, param)
    prompts = [codec.encode(item) if isinstance(item, str) else tuple(item) for item in items]
    for prompt in prompts:
        check_ids(prompt, codec.tokenizer.vocab, param)
    return prompts


def _standing(client: Client, user: str | None, priority: int | None, adapter: str) -> _Standing:
    """Whom the engine serves, how soon, and as which model."""
    if priority is not None and priority < 0 and not client.trusted:
        raise RequestError(
            403,
            f"priority {priority} needs a key that is trusted; this one may use 0 or more",
            param="priority",
        )
    name = f"{client.name}/{user}" if user is not None and client.trusted else client.name
    return {"client": name, "priority": priority or 0, "adapter": adapter}


class _Standing(TypedDict):
    client: str
    priority: int
    adapter: str


def _requests(
    body: SamplingFields,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int | None,
    default_tokens: int,
    logprobs: int | None,
    codec: TextCodec,
    limits: Limits,
    client: Client,
    adapter: str,
) -> list[Request]:
    n = body.n or 1
    who = _standing(client, body.user, body.priority, adapter)
    seed = secrets.randbits(63) if body.seed is None else body.seed
    bias = {int(id): value for id, value in (body.logit_bias or {}).items()}
    if bias and max(bias) >= codec.tokenizer.vocab:
        raise RequestError(
            400,
            f"token id {max(bias)} is outside the vocabulary of {codec.tokenizer.vocab} tokens",
            param="logit_bias",
        )
    guide = _checked_guide(body, codec)
    if body.relay is not None and body.relay.choices and not body.stream:
        raise RequestError(400, "only a stream can be continued; send stream: true", param="relay")
    requests: list[Request] = []
    for prompt in prompts:
        tokens = _completion_tokens(len(prompt), max_tokens, default_tokens, limits.context_tokens)
        for choice in range(n):
            params = SamplingParams(
                max_tokens=tokens,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=max(body.top_k or 0, 0),
                seed=seed + choice,  # the n choices of one prompt differ, and each is reproducible
                stop_ids=frozenset() if body.ignore_eos else codec.eos_ids,
                logprobs=logprobs,
                min_p=body.min_p or 0.0,
                repetition_penalty=body.repetition_penalty or 1.0,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                logit_bias=tuple(sorted(bias.items())),
                guide=guide,
            )
            generated = _generated(body.relay, len(requests), params, codec)
            requests.append(
                Request(id=uuid.uuid4().hex, prompt=prompt, params=params, generated=generated, **who)
            )
    return requests


def _generated(relay: Relay | None, index: int, params: SamplingParams, codec: TextCodec) -> tuple[int, ...]:
    """Ids of a choice that another replica has delivered."""
    progress = None if relay is None else relay.of(index)
    if progress is None or (not progress.ids and not progress.finished):
        return ()
    ids = tuple(progress.ids)
    wrong: str | None = None
    if ids and max(ids) >= codec.tokenizer.vocab:
        wrong = f"token id {max(ids)} is outside the vocabulary of {codec.tokenizer.vocab} tokens"
    elif not progress.finished and len(ids) >= params.max_tokens:
        wrong = f"{len(ids)} tokens are delivered already, of max_tokens {params.max_tokens}"
    elif not progress.finished and not params.stop_ids.isdisjoint(ids):
        wrong = "the end of sequence is delivered already"
    if wrong is not None:
        raise RequestError(400, f"choice {index} cannot be continued: {wrong}", param="relay")
    return ids


def _checked_guide(body: SamplingFields, codec: TextCodec) -> Guide | None:
    try:
        given = body.guides
    except ValueError as error:
        raise RequestError(400, str(error), param="tools") from None
    if len(given) > 1:
        names = " and ".join(given)
        raise RequestError(400, f"{names} contradict each other; send one of them", param=next(iter(given)))
    for name, guide in given.items():
        try:
            codec.guides.start(guide)
        except UsageError as error:
            raise RequestError(400, str(error), param=name) from None
        return guide
    return None


def _completion_tokens(prompt: int, asked: int | None, default: int, context: int) -> int:
    room = context - prompt
    wanted = 1 if asked is None else asked
    if wanted > room:
        raise RequestError(
            400,
            f"the model's context is {context} tokens, but the prompt has {prompt} and max_tokens asks for "
            f"{wanted} more ({prompt + wanted} in all); shorten the prompt or ask for at most {max(room, 0)}",
            param="max_tokens" if room > 0 else "prompt",
            code="context_length_exceeded",
        )
    return min(default, room) if asked is None else asked


def _check_choices(prompts: int, n: int, most: int) -> None:
    if prompts * n > most:
        raise RequestError(
            400,
            f"{prompts} prompts x n = {n} make {prompts * n} sequences, but one request may have {most}; split it",
            param="n",
        )


def _check_lengths(texts: Sequence[str], codec: TextCodec, context: int, param: str) -> None:
    """Refuse what cannot fit before it is tokenised: megabytes take seconds."""
    least = max(map(codec.least_tokens, texts), default=0)
    if least > context:
        raise _too_long(f"has at least {least}", context, param)


def _too_long(has: str, context: int, param: str) -> RequestError:
    message = f"the model's context is {context} tokens, but the prompt {has}; shorten it"
    return RequestError(400, message, param=param, code="context_length_exceeded")


def check_ids(ids: Sequence[int], vocab: int, param: str) -> None:
    """Raise RequestError for no ids, and for unknown ones."""
    if not ids:
        raise RequestError(400, "the prompt has no tokens; send at least one", param=param)
    if max(ids) >= vocab:
        raise RequestError(
            400, f"token id {max(ids)} is outside the vocabulary of {vocab} tokens", param=param
        )
