"""What the OpenAPI document says about answers; about requests it says what `schema` declares."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

Json = dict[str, Any]

_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_MAYBE_TEXT: Json = {"type": ["string", "null"]}


def _object(**properties: Json) -> Json:
    """All of them are required, and others may be there."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


def _one_of(*values: str | None) -> Json:
    return {"enum": list(values)}


_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE_TEXT, code=_MAYBE_TEXT))
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "usage": _USAGE}
_MESSAGE = _object(role=_one_of("assistant"), content=_MAYBE_TEXT)
_CARD = _object(id=_TEXT, object=_one_of("model"), created=_COUNT, owned_by=_TEXT)
_EMBEDDING: Json = {"anyOf": [_TEXT, _list({"type": "number"})]}


def _answers(schema: Json, *, streams: bool = False, kind: str = "application/json") -> Json:
    content: Json = {kind: {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": _object(data=_TEXT)}  # of each event
    failure = {"content": {"application/json": {"schema": _ERROR}}}
    return {
        "responses": {
            200: {"description": "The answer.", "content": content},
            "4XX": {"description": "What is wrong with the request, or too much of it.", **failure},
            "5XX": {"description": "The server cannot answer.", **failure},
        }
    }


COMPLETION = _answers(
    _object(
        **_HEAD,
        object=_one_of("text_completion"),
        choices=_list(_object(index=_COUNT, text=_TEXT, finish_reason=_one_of("stop", "length"))),
    ),
    streams=True,
)
CHAT = _answers(
    _object(
        **_HEAD,
        object=_one_of("chat.completion"),
        choices=_list(
            _object(index=_COUNT, message=_MESSAGE, finish_reason=_one_of("stop", "length", "tool_calls"))
        ),
    ),
    streams=True,
)
EMBEDDINGS = _answers(
    _object(
        object=_one_of("list"),
        data=_list(_object(object=_one_of("embedding"), index=_COUNT, embedding=_EMBEDDING)),
        model=_TEXT,
        usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
    )
)
TOKENIZE = _answers(_object(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT)))
DETOKENIZE = _answers(_object(prompt=_TEXT))
MODELS = _answers(_object(object=_one_of("list"), data=_list(_CARD)))
MODEL = _answers(_CARD)
HEALTH = _answers(_object(status=_TEXT))
_STATUS = {"content": {"application/json": {"schema": _object(status=_TEXT)}}}
READY: Json = {
    "responses": {
        200: {"description": "Send requests here.", **_STATUS},
        503: {"description": "Not yet, or no more.", **_STATUS},
    }
}
METRICS = _answers(_TEXT, kind="text/plain")


def install(app: FastAPI) -> None:
    """Have the document say that a key may be asked for."""

    def document() -> Json:
        if app.openapi_schema is None:
            made = get_openapi(title="muster", version=app.version, routes=app.routes)
            made.setdefault("components", {})["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"}
            }
            made["security"] = [{"key": []}, {}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
