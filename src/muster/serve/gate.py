"""The first and last to see each HTTP request: its id, its key, its rate, whether the server still takes work, its line
in the log. Everything here happens before a byte of the body is read.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muster.serve import playground
from muster.serve.failures import RequestError, respond
from muster.serve.handover import Handover
from muster.serve.keys import Keys
from muster.serve.metrics import Metrics
from muster.serve.protocol import Overloaded
from muster.serve.rates import Rates
from muster.serve.visit import AccessLog, Visit

OPEN = ("/health", "/health/ready", playground.PATH)
"""May be read without a key, and never refused."""
QUEUED = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
"""What waits for the engine."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class Front:
    """What all requests share."""

    keys: Keys = field(default_factory=Keys)
    rates: Rates = field(default_factory=Rates)
    metrics: Metrics = field(default_factory=Metrics)
    log: AccessLog | None = None
    handover: Handover | None = None
    """Of a replica that was started by a router."""
    phase: Literal["starting", "ready", "draining"] = "starting"
    """Whether others should send requests here; draining: new ones are refused."""
    check: Callable[[], None] = lambda: None
    """Raises Overloaded where whatever is asked for in `QUEUED` would be refused: under a crowd most requests end here,
    and so it has to be cheap."""


class Gate:
    """ASGI middleware; goes around all others."""

    def __init__(self, app: ASGIApp, front: Front) -> None:
        self._app, self._front = app, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        visit = _visit(scope, headers)
        visit.enter(scope)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", visit.id.encode())]
            await send(message)

        self._front.metrics.in_progress += 1
        try:
            app = self._refusal(scope, headers, visit) or self._app
            await app(scope, receive, named)
        finally:
            self._leave(visit)

    def _refusal(self, scope: Scope, headers: Headers, visit: Visit) -> Response | None:
        if scope["path"] in OPEN and scope["method"] in ("GET", "HEAD"):
            return None
        front = self._front
        given = headers.get("authorization")
        client = front.keys.client_of(None if given is None else given.encode("latin-1"))
        if client is None:
            refused = RequestError(401, "send a valid key of this server: Authorization: Bearer KEY")
            response = respond(refused)
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        visit.client = client
        if scope["method"] != "POST":
            return None
        if front.phase == "draining":
            return respond(RequestError(503, "the server is stopping; ask another", retry_after_s=1))
        try:
            if scope["path"] in QUEUED:
                front.check()
            front.rates.ask(client.name)
        except (RequestError, Overloaded) as error:
            return respond(error)
        return None

    def _leave(self, visit: Visit) -> None:
        front = self._front
        front.metrics.in_progress -= 1
        front.metrics.responses[visit.status or 499] += 1
        if visit.output_tokens:
            front.rates.use(visit.client.name, visit.output_tokens)
        if front.log is not None and visit.path not in OPEN:
            front.log.write(visit)


def _visit(scope: Scope, headers: Headers) -> Visit:
    given = headers.get("x-request-id", "")
    peer = scope.get("client")
    return Visit(
        id=given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
        method=scope["method"],
        path=scope["path"],
        peer=str(peer[0]) if peer else "",
    )
