"""Every failure in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}.

Messages name the cause, the figure and the next step, and never show the input back (it may be
megabytes, or a secret); an unexpected exception says so and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from muster.serve.protocol import EngineError, Overloaded

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """A request that cannot be answered; becomes the HTTP response of that status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """The JSON of one failure."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers=headers)


def describe(error: Exception) -> dict[str, dict[str, str | None]]:
    """An exception as the JSON of a failure; unexpected ones are not described."""
    if isinstance(error, RequestError):
        return error_body(error.status, str(error), param=error.param, code=error.code)
    if isinstance(error, Overloaded):
        return error_body(429, str(error), code="overloaded")
    if isinstance(error, TimeoutError):
        return error_body(504, "the request took longer than this server allows; ask for fewer tokens")
    if isinstance(error, EngineError):
        return error_body(500, str(error))
    return error_body(500, "internal error; the server's log has the details")


def _status(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, Overloaded):
        return 429
    return 504 if isinstance(error, TimeoutError) else 500


def respond(error: Exception) -> Response:
    """The HTTP response for an exception."""
    retry_s = error.retry_after_s if isinstance(error, (Overloaded, RequestError)) else None
    headers = None if retry_s is None else {"Retry-After": str(retry_s)}
    return JSONResponse(describe(error), _status(error), headers=headers)


def explain(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """(message, param) of the first of pydantic's errors."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at character {error['loc'][-1]}", None
    path = ".".join(str(part) for part in error["loc"] if part != "body")
    if error["type"] == "missing":
        return (f"{path} is required" if path else "the body should be a JSON object"), path or None
    if "param" in error.get("ctx", {}):
        return str(error["msg"]), str(error["ctx"]["param"])
    what = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{path or 'the body'} {what}", path or None


def install(app: FastAPI) -> None:
    """Make `app` answer all its failures in the shape above."""

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = explain(error.errors())
        return error_response(400, message, param=param)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if message == HTTPStatus(error.status_code).phrase:  # the router's own: say of what
            message = f"{message.lower()}: {request.method} {request.url.path}"
        return error_response(error.status_code, message, headers=error.headers)

    async def known(_: Request, error: Exception) -> Response:
        return respond(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    for kind in (RequestError, Overloaded, EngineError, TimeoutError, Exception):
        app.add_exception_handler(kind, known)
