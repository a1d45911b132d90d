"""What is asked about tokens rather than for them: a text's ids, and a text's embedding."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import orjson

from muster.serve.codec import TextCodec
from muster.serve.intake import check_ids, encode_messages
from muster.serve.limits import Limits
from muster.serve.protocol import Engine, Request
from muster.serve.schema import DetokenizeRequest, TokenizeRequest


def tokenized(body: TokenizeRequest, codec: TextCodec, limits: Limits) -> bytes:
    """The JSON answer of /tokenize; raises RequestError."""
    if body.messages is not None:
        ids = encode_messages(body.messages, body.tools or (), codec, limits)
    elif body.add_special_tokens is False:
        ids = tuple(codec.tokenizer.encode(body.prompt or ""))
    else:
        ids = codec.encode(body.prompt or "")
    texts = [codec.decode([id]) for id in ids] if body.return_token_strs else None
    return orjson.dumps(
        {"count": len(ids), "max_model_len": limits.context_tokens, "tokens": ids, "token_strs": texts}
    )


def detokenized(body: DetokenizeRequest, codec: TextCodec) -> bytes:
    """The JSON answer of /detokenize; raises RequestError."""
    if body.tokens:
        check_ids(body.tokens, codec.tokenizer.vocab, "tokens")
    return orjson.dumps({"prompt": codec.decode(body.tokens)})


async def embedded(engine: Engine, requests: Sequence[Request], timeout_s: float) -> list[tuple[float, ...]]:
    """The embedding of each request; raises Overloaded, EngineError or TimeoutError."""
    try:
        async with asyncio.timeout(timeout_s):
            streams = [engine.submit(request) for request in requests]
            return [(await anext(stream)).embedding for stream in streams]
    finally:
        for request in requests:
            engine.cancel(request.id)
