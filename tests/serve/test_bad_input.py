"""Whatever a client sends: a 4xx in OpenAI's shape that says what to do, and a server that lives on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

OK: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def post(served: Any, path: str, body: bytes, content_type: str = "application/json") -> httpx.Response:
    return httpx.post(f"{served.url}/v1/{path}", content=body, headers={"Content-Type": content_type})


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"prompt": None}, "prompt", "should be a string, a list of strings"),
        ({"prompt": []}, "prompt", "none empty"),
        ({"prompt": [[]]}, "prompt", "none empty"),
        ({"prompt": [1, "a"]}, "prompt", "should be"),
        ({"prompt": {"a": 1}}, "prompt", "should be"),
        ({"prompt": [-1]}, "prompt", "should be"),
        ({"prompt": [999_999]}, "prompt", "token id 999999 is outside the vocabulary of"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        (
            {"max_tokens": 96},
            "max_tokens",
            "context is 96 tokens, but the prompt has 1 and max_tokens asks for 96",
        ),
        ({"prompt": "x" * 500}, "prompt", "the prompt has 500"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 100}, "n", "100 sequences, but one request may have 64"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": 1, "echo": True}, "echo", "cannot be combined"),
        ({"stop": 5}, "stop", "a string or a list of at most 16"),
        ({"stop": ["a"] * 17}, "stop", "a string or a list of at most 16"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"logit_bias": {"50": 101}}, "logit_bias.50", "less than or equal to 100"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "token id 999 is outside the vocabulary of 257"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a.[key]", "match pattern"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty", "valid number"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"guided_regex": "[a"}, "guided_regex", "the regex guide is not valid"),
        ({"guided_choice": []}, "guided_choice", "at least 1 item"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "Invalid type: nonsense"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "the json guide is not valid"),
        ({"structured_outputs": {"regex": "(b"}}, "structured_outputs.regex", "not valid"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "contradict each other"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"model": 5}, "model", "valid string"),
    ],
)
def test_wrong_fields_of_completions(served: Any, changes: dict[str, Any], param: str, message: str) -> None:
    error = refusal(post(served, "completions", json.dumps(OK | changes).encode()))
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
            "should be a string or a list of {type: text",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is required"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}},
            "response_format",
            "the json guide is not valid",
        ),
        ({"max_completion_tokens": 1000}, "max_tokens", "context is 96"),
    ],
)
def test_wrong_fields_of_chat(served: Any, changes: dict[str, Any], param: str, message: str) -> None:
    error = refusal(post(served, "chat/completions", json.dumps(CHAT | changes).encode()))
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("field", ["model", "prompt"])
def test_missing_fields_are_named(served: Any, field: str) -> None:
    body = {name: value for name, value in OK.items() if name != field}
    error = refusal(post(served, "completions", json.dumps(body).encode()))
    assert (error["message"], error["param"]) == (f"{field} is required", field)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"5",
        b"[]",
        b'"text"',
        b"\xff\xfe{}",
        b'{"model": "tiny", "prompt": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "top_p": Infinity}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 10_000 + b"}",
        b'{"model": "tiny", "prompt": "a", "seed": 1e400}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny\\udfff", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "a", "stop": "\\ud800"}',
        b'{"model": "tiny", "prompt": [1, 2, ' + b"9" * 100 + b"]}",
    ],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_broken_bodies(served: Any, path: str, body: bytes) -> None:
    refusal(post(served, path, body))


def test_fields_that_change_nothing_are_ignored(served: Any) -> None:
    more = {"user": "me", "metadata": {"a": 1}, "presence_penalty": 0, "logit_bias": None, "unheard_of": [1]}
    assert post(served, "completions", json.dumps(OK | more).encode()).status_code == 200
    more = {"tools": [], "response_format": {"type": "text"}, "tool_choice": "auto", "store": False}
    assert post(served, "chat/completions", json.dumps(CHAT | more).encode()).status_code == 200


def test_nulls_mean_defaults(served: Any) -> None:
    nulls = dict.fromkeys(
        ["max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "stream", "echo"]
    )
    answer = post(served, "completions", json.dumps(OK | nulls).encode())
    assert answer.json()["usage"]["completion_tokens"] <= 16


def test_the_content_type_must_be_json(served: Any) -> None:
    """Web pages can send forms and plain text to a local server without asking; JSON they cannot."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error = refusal(post(served, "completions", json.dumps(OK).encode(), kind), 415)
        assert "send application/json" in error["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_bodies(serving: Any, model: Any, declared: bool) -> None:
    body = json.dumps(OK | {"prompt": "x" * 200_000}).encode()
    with serving(model, body_bytes=100_000) as served:
        content = body if declared else iter([body[:50_000], body[50_000:]])
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{served.url}/v1/completions", content=content, headers=headers)  # type: ignore[arg-type]
        assert "larger than 100000 bytes" in refusal(answer, 413)["message"]
        assert post(served, "completions", json.dumps(OK).encode()).status_code == 200


def test_unknown_routes_methods_and_models(served: Any, client: openai.OpenAI) -> None:
    assert "not found: GET /v2" in refusal(httpx.get(f"{served.url}/v2"), 404)["message"]
    assert "not allowed" in refusal(httpx.get(f"{served.url}/v1/completions"), 405)["message"]
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-9' is not served here") as failure:
        client.completions.create(model="gpt-9", prompt="a")
    assert (failure.value.code, failure.value.param) == ("model_not_found", "model")


def test_the_clients_exception_for_a_prompt_beyond_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 91") as failure:
        client.completions.create(model="tiny", prompt="abcde", max_tokens=1000)
    assert failure.value.code == "context_length_exceeded"


def test_after_all_this_the_server_answers(served: Any, client: openai.OpenAI) -> None:
    assert served.engine.stats().running == 0
    assert client.completions.create(model="tiny", prompt="a", max_tokens=3, temperature=0).choices[0].text
