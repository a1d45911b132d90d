"""Thousands of requests that nobody would write: no answer is a 5xx, and what others get does not change.

The short form runs in CI; `-m long` runs more than 10^5 cases with seeds that differ from run to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis

# What it imports when it is used would be compiled beside threads that change the recursion limit: Python 3.11 fails.
import schemathesis.specs.openapi.adapter.v2
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from muster.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from muster.serve.template import JinjaTemplate

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson if tools else '' }}"
CONTROL = {
    "model": "tiny",
    "prompt": "control",
    "max_tokens": 24,
    "temperature": 0,
    "logprobs": 2,
    "ignore_eos": True,
}
HEADERS = {"Content-Type": "application/json"}

MODELS = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
SOUND: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 2,
    },
    "/v1/embeddings": {"model": "tiny", "input": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}


def deep(levels: int, kind: str = "dict") -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = {"properties": {"a": value}} if kind == "dict" else [value]
    return value


def tool(parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def nasty() -> list[Any]:
    return [
        None, True, 0, 1, -1, 2, 64, 65, 128, 10**6, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 1e308, -0.0, 5e-324,
        float("nan"), float("inf"), float("-inf"), "", "a", "\ud800", "a\udfffb", "\x00", "\u202e🙂", "x" * 5000,
        "<|endoftext|>", "tiny", "none", "required", "(" * 50, "(a*)*b", "[^]", ".*", "a{1000}", [], [[]], {}, [None],
        [1], [256], [257], [-1], [0.5], [[1], [2]], ["a", "b"], ["a"] * 70, [1] * 97, [[1]] * 65, {"a": 1}, {"1": 1},
        {"1": float("nan")}, {"999999999": 0}, {"type": "object"}, {"type": "nonsense"}, {"$ref": "#"}, {"$ref": "#/a"},
        {"enum": []}, {"const": "\ud800"}, {"anyOf": [{}] * 50}, {"pattern": "("}, {"minimum": 10**400}, {"not": {}},
        deep(40), deep(90, "list"), deep(300), deep(400, "list"), {"type": "json_schema"}, {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"schema": {"type": "string", "maxLength": 10**9}}},
        {"include_usage": 1}, {"json": {"type": "array", "items": {"$ref": "#"}}}, {"regex": "\\"},
        {"choice": ["\ud83d"]},
        [{"role": "user", "content": None}], [{"role": "tool", "content": "\ud800"}], [{"role": "user"}] * 50,
        [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], [{"type": "function", "function": {}}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 3000}}]}],
        [{"type": "function", "function": {"name": "f", "parameters": deep(95)}}],
        [{"type": "function", "function": {"name": "f", "parameters": {"\ud800": 1}}}],
    ]  # fmt: skip


def mutated(chance: random.Random, path: str, values: list[Any]) -> bytes:
    """A body with fields of any kind, or bytes that hardly are one."""
    body = dict(SOUND[path])
    names = [*MODELS[path].model_fields, "unheard_of"]
    for _ in range(chance.choice((1, 1, 2, 3))):
        body[chance.choice(names)] = chance.choice(values)
    if chance.random() < 0.05:
        body |= tool(chance.choice(values)) | {"tool_choice": "required"}
    text = bytearray(json.dumps(body).encode())
    if chance.random() < 0.15:
        for _ in range(chance.randint(1, 5)):
            place = chance.randrange(len(text))
            what = chance.choice((b"", b"\xff", b'"', b"}", b"\\u", b"9" * 50, b"\x00", b"[" * 1200))
            text[place : place + chance.randint(0, 3)] = what
            text = text or bytearray(b" ")
    return bytes(text)


@pytest.fixture(scope="module")
def fuzzed(serving: Any, make_model: Any) -> Iterator[Any]:
    limits = {"header_s": 0.5, "body_s": 0.5, "header_bytes": 8192, "body_bytes": 200_000, "choices": 8}
    with serving(make_model(context=40), template=JinjaTemplate(TEMPLATE, {}), **limits) as served:
        yield served


@pytest.fixture
def unchanged(fuzzed: Any) -> Iterator[Callable[[], None]]:
    """Fails when a control request's answer has changed, or when something is left over in the end."""

    def control() -> Any:
        answer = httpx.post(f"{fuzzed.url}/v1/completions", json=CONTROL, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    before = control()

    def check() -> None:
        assert control() == before

    yield check
    check()
    deadline = time.monotonic() + 10
    while fuzzed.engine.stats().used_blocks or len(fuzzed.server.server_state.tasks):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def post_all(fuzzed: Any, seed: int, count: int, check: Callable[[], None]) -> Counter[int]:
    chance, values, statuses = random.Random(seed), nasty(), Counter[int]()
    connection = http.client.HTTPConnection(*fuzzed.address, timeout=60)
    with contextlib.closing(connection):
        for number in range(count):
            path = chance.choice(list(SOUND))
            body = mutated(chance, path, values)
            connection.request("POST", path, body, HEADERS)
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status < 500, (path, body[:2000], said)
            if answer.status != 200:
                assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}
            elif answer.getheader("content-type", "").startswith("text/event-stream"):
                assert b'"error"' not in said, (path, body[:2000], said[-500:])
            statuses[answer.status] += 1
            if number % 500 == 499:
                check()
    return statuses


def test_bodies_of_any_kind(fuzzed: Any, unchanged: Callable[[], None]) -> None:
    statuses = post_all(fuzzed, 1, 400, unchanged)
    assert statuses[200] > 20
    assert statuses[400] > 100


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_bodies_of_any_kind_for_long(fuzzed: Any, unchanged: Callable[[], None]) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")  # noqa: T201
    post_all(fuzzed, seed, 80_000, unchanged)


def raw(chance: random.Random) -> bytes:
    """Something like a request."""
    path = chance.choice(list(SOUND))
    body = json.dumps(SOUND[path]).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n".encode()
    )
    if chance.random() < 0.3:
        parts = [body[place : place + 7] for place in range(0, len(body), 7)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
        text = bytearray(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    else:
        text = bytearray(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    pieces = (
        b"", b"\r\n", b"\x00", b"\xff\xfe", b"Transfer-Encoding: gzip\r\n", b"Content-Length: 3\r\n", b" ",
        b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"OPTIONS * HTTP/1.1\r\n",
        b"HTTP/0.9", b"HTTP/2.0", b"%zz%00", b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n", b"X: " + b"y" * 9000,
        b"9" * 30, chance.randbytes(20), b"\r\n\r\n", b"Authorization: Bearer \xe9\r\n", b"X-Request-Id: \xff\r\n",
        b"HEAD ", b"?a=%ff&b", b"/../",
    )  # fmt: skip
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = chance.randrange(len(text))
        if chance.random() < 0.6:
            place = text.find(b"\n", place // 3) + 1  # between lines, where headers are
        text[place : place + chance.choice((0, 0, 0, 1, 5))] = chance.choice(pieces)
    return bytes(text[: chance.randrange(1, len(text))] if chance.random() < 0.1 else text)


async def send_raw(fuzzed: Any, chance: random.Random, count: int, at_once: int) -> Counter[bytes]:
    statuses, room = Counter[bytes](), asyncio.Semaphore(at_once)

    async def one(data: bytes) -> None:
        async with room:
            reader, writer = await asyncio.open_connection(*fuzzed.address)
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                said, patience_s = b"", 60.0
                with contextlib.suppress(TimeoutError):
                    while more := await asyncio.wait_for(reader.read(1 << 16), patience_s):
                        said, patience_s = said + more, 0.7  # it may be kept open for a next request
                assert said or patience_s == 60.0
                assert not said.startswith(b"HTTP/1.1 5"), (data, said)
                assert b"\r\nHTTP/1.1 5" not in said, (data, said)
                statuses[said[9:12]] += 1
            writer.close()

    await asyncio.gather(*(one(raw(chance)) for _ in range(count)))
    return statuses


def test_bytes_of_any_kind(fuzzed: Any, unchanged: Callable[[], None]) -> None:
    statuses = asyncio.run(send_raw(fuzzed, random.Random(2), 500, at_once=100))
    assert statuses[b"200"] > 20
    assert statuses[b"400"] > 20
    assert statuses[b"408"] > 5


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_bytes_of_any_kind_for_long(fuzzed: Any, unchanged: Callable[[], None]) -> None:
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")  # noqa: T201
    for part in range(20):
        asyncio.run(send_raw(fuzzed, random.Random(seed + part), 1000, at_once=200))
        unchanged()


def conforms(fuzzed: Any, examples: int, *, repeatable: bool) -> int:
    """Cases that schemathesis makes of the OpenAPI document, valid and not; the answers are as it says."""
    document = httpx.get(f"{fuzzed.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    sent = 0

    def run(operation: Any, mode: Any) -> None:
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=repeatable,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def cases(case: Any) -> None:
            nonlocal sent
            sent += 1
            if isinstance(case.body, dict):
                if sent % 3:
                    case.body["model"] = "tiny"
                if isinstance(case.body.get("max_tokens"), (int, type(None))):
                    case.body["max_tokens"] = 3
            case.call_and_validate(base_url=fuzzed.url, checks=checks)

        cases()

    for found in schema.get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            operation = found.ok()
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.method.lower() == "get":
                continue  # nothing to get wrong
            run(operation, mode)
    return sent


def test_the_openapi_document_is_true(fuzzed: Any, unchanged: Callable[[], None]) -> None:
    assert conforms(fuzzed, 5, repeatable=True) > 40


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_openapi_document_is_true_for_long(fuzzed: Any, unchanged: Callable[[], None]) -> None:
    assert conforms(fuzzed, 1000, repeatable=False) > 5000
