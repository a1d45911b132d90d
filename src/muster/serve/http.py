"""The OpenAI-compatible HTTP API over any `Engine`: routes only; `answer` generates, `failures` explains.

Knows no sockets: `server` runs the app, `receipt` guards how requests arrive, and `gate` whose they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from muster.serve import document, failures, handover, metrics
from muster.serve.answer import Answer, StreamedAnswer
from muster.serve.body import BodyGuard
from muster.serve.codec import TextCodec
from muster.serve.connection import while_connected
from muster.serve.failures import RequestError
from muster.serve.gate import Front, Gate
from muster.serve.intake import Job, read_chat, read_completion, read_embedding
from muster.serve.keys import Client
from muster.serve.limits import Limits
from muster.serve.playground import PATH, playground
from muster.serve.protocol import Engine
from muster.serve.responses import Json, embeddings
from muster.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from muster.serve.template import PLAIN
from muster.serve.tokens import detokenized, embedded, tokenized
from muster.serve.visit import Visit

JSON = "application/json"
Body = TypeVar("Body", CompletionRequest, ChatRequest, EmbeddingRequest)
Read = TypeVar("Read")


def build_app(
    engine: Engine,
    codec: TextCodec,
    model_id: str,
    limits: Limits,
    front: Front | None = None,
    adapters: Sequence[str] = (),
) -> ASGIApp:
    """An ASGI app that serves one model, and under their own names its adapters. The caller owns `engine` and closes
    it."""
    front = front or Front()
    front.check = engine.check
    app = FastAPI(title="muster", docs_url=None, redoc_url=None)
    failures.install(app)
    document.install(app)
    card = {
        "id": model_id,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "muster",
        "max_model_len": limits.context_tokens,  # extension, as in vLLM
        "chat_template": codec.template is not PLAIN,  # extension, for `muster chat`
    }

    def served(name: str) -> Json:
        step = engine.stats().weights_step
        parent = {} if name == model_id else {"id": name, "parent": model_id}  # as in vLLM
        return (
            card | parent | ({"step": step} if step else {})
        )  # extension: it rises where a training is followed

    def check_model(name: str) -> str:
        """The adapter that a model's name stands for; none is the model alone."""
        if name == model_id:
            return ""
        if name in adapters:
            return name
        others = f" or one of its {len(adapters)} adapters" if adapters else ""
        raise RequestError(
            404,
            f"the model '{name[:200]}' is not served here; use '{model_id}'{others}",
            param="model",
            code="model_not_found",
        )

    def charge(prompt_tokens: int, visit: Visit) -> None:
        visit.prompt_tokens = prompt_tokens
        front.rates.use(visit.client.name, prompt_tokens)

    async def respond(job: Job, name: str, request: Request) -> Response:
        if front.handover is not None and (blocks := front.handover.file_of(request)) is not None:
            return await handover.give(engine, job.requests[0], blocks)
        visit = Visit.of(request.scope)
        charge(job.prompt_tokens, visit)
        answer = Answer(job, engine, codec.decode, name, visit, front.metrics)
        if job.stream:
            return StreamedAnswer(answer, limits.request_s)
        try:
            return await answer.whole(request.receive, limits.request_s)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; 499 is the usual name in access logs

    @app.get(PATH, include_in_schema=False)
    async def page() -> Response:
        return playground()

    @app.post(handover.TAKE, include_in_schema=False)
    async def take(request: Request) -> Response:
        blocks = None if front.handover is None else front.handover.file_of(request)
        if blocks is None:
            raise HTTPException(404)
        return await handover.take(engine, blocks)

    @app.get("/health", **document.HEALTH)
    async def health() -> Json:
        return {"status": "ok", "model": model_id, "relay": True}  # extension: see serve/relay.py

    @app.get("/health/ready", **document.READY)
    async def ready() -> Response:
        phase = front.phase if engine.stats().ready else "starting"
        return JSONResponse({"status": phase}, 200 if phase == "ready" else 503)

    @app.get("/metrics", **document.METRICS)
    async def scrape() -> Response:
        return Response(front.metrics.render(engine.stats(), model_id), media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/models", **document.MODELS)
    async def models() -> Json:
        return {"object": "list", "data": [served(name) for name in (model_id, *adapters)]}

    @app.get("/v1/models/{name:path}", **document.MODEL)
    async def model(name: str) -> Response:
        check_model(name)
        return JSONResponse(served(name))

    async def read(
        reader: Callable[[Body, TextCodec, Limits, Client, str], Read], body: Body, request: Request
    ) -> Read:
        """A body as work. Tokenising releases the GIL and may take a while: other streams go on meanwhile."""
        adapter = check_model(body.model)
        engine.check()
        visit = Visit.of(request.scope)
        return await asyncio.to_thread(reader, body, codec, limits, visit.client, adapter)

    @app.post("/v1/completions", **document.COMPLETION)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(await read(read_completion, body, request), body.model, request)

    @app.post("/v1/chat/completions", **document.CHAT)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await respond(await read(read_chat, body, request), body.model, request)

    @app.post("/v1/embeddings", **document.EMBEDDINGS)
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        requests = await read(read_embedding, body, request)
        prompt_tokens = sum(len(one.prompt) for one in requests)
        charge(prompt_tokens, Visit.of(request.scope))
        try:
            vectors = await while_connected(request.receive, embedded(engine, requests, limits.request_s))
        except ClientDisconnect:
            return Response(status_code=499)
        base64 = body.encoding_format == "base64"
        return JSONResponse(embeddings(vectors, body.model, prompt_tokens, base64))

    @app.post("/tokenize", **document.TOKENIZE)
    async def tokenize(body: TokenizeRequest) -> Response:
        check_model(model_id if body.model is None else body.model)
        return Response(await asyncio.to_thread(tokenized, body, codec, limits), media_type=JSON)

    @app.post("/detokenize", **document.DETOKENIZE)
    async def detokenize(body: DetokenizeRequest) -> Response:
        check_model(model_id if body.model is None else body.model)
        return Response(await asyncio.to_thread(detokenized, body, codec), media_type=JSON)

    return Gate(BodyGuard(app, limits.body_bytes), front)
