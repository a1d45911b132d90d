"""The OpenAI-compatible HTTP API over any `Engine`: routes only; `answer` generates, `failures` explains.

Knows no sockets: `server` runs the app, and `receipt` guards how requests arrive.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from muster.serve import failures
from muster.serve.answer import Answer, StreamedAnswer
from muster.serve.body import BodyGuard
from muster.serve.codec import TextCodec
from muster.serve.failures import RequestError
from muster.serve.intake import Job, read_chat, read_completion
from muster.serve.limits import Limits
from muster.serve.protocol import Engine
from muster.serve.responses import Json
from muster.serve.schema import ChatRequest, CompletionRequest
from muster.serve.template import PLAIN


def build_app(engine: Engine, codec: TextCodec, model_id: str, limits: Limits) -> FastAPI:
    """An ASGI app that serves one model. The caller owns `engine` and closes it."""
    app = FastAPI(title="muster", docs_url=None, redoc_url=None)
    app.add_middleware(BodyGuard, limit_bytes=limits.body_bytes)
    failures.install(app)
    card = {
        "id": model_id,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "muster",
        "max_model_len": limits.context_tokens,  # extension, as in vLLM
        "chat_template": codec.template is not PLAIN,  # extension, for `muster chat`
    }

    def check_model(name: str) -> None:
        if name != model_id:
            raise RequestError(
                404,
                f"the model '{name[:200]}' is not served here; use '{model_id}'",
                param="model",
                code="model_not_found",
            )

    async def respond(job: Job, request: Request) -> Response:
        answer = Answer(job, engine, codec.decode, model_id, limits.request_s)
        if job.stream:
            return StreamedAnswer(answer, limits.request_s)
        try:
            return await answer.whole(request.receive)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; 499 is the usual name in access logs

    @app.get("/health")
    async def health() -> Json:
        return {"status": "ok", "model": model_id, "relay": True}  # extension: see serve/relay.py

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(name)
        return JSONResponse(card)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        # Tokenising releases the GIL and may take a while: other streams go on meanwhile.
        job = await asyncio.to_thread(read_completion, body, codec, limits)
        return await respond(job, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        job = await asyncio.to_thread(read_chat, body, codec, limits)
        return await respond(job, request)

    return app
