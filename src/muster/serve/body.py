"""Guards of a request's body, before anything parses it: its size by counting, and its declared type."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from muster.serve.failures import error_response


class BodyGuard:
    """ASGI middleware: 413 for bodies over `limit_bytes`, declared or counted, and 415 for other than JSON.

    Asking for the JSON content type also keeps web pages out: a browser sends it to another origin only
    after a preflight request, which this server does not grant. What is still to come of a refused body
    is read and dropped (until its deadline): closing at once would reset the connection before a client
    that is busy sending had read the answer.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                refusal = error_response(415, f"the content type is '{kind[:80]}'; send application/json")
                await refusal(scope, receive, send)
                return
        if int(headers.get("content-length", "0")) > self._limit_bytes:  # h11 has checked that it is a number
            await error_response(413, self._too_large())(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit_bytes:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> str:
        return f"the body is larger than {self._limit_bytes} bytes; send less at once"
