"""Structured output and the sampler's parameters, with the official client."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["round", "square"]},
    },
    "required": ["count", "kind"],
    "additionalProperties": False,
}
MESSAGES: Any = [{"role": "user", "content": "a shape"}]


def complete(client: openai.OpenAI, **extra: Any) -> Any:
    return client.completions.create(
        model="tiny", prompt="x", max_tokens=60, temperature=1, seed=3, extra_body=extra
    ).choices[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_in_chat(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=60,
        temperature=1,
        stream=stream,
        response_format={"type": "json_schema", "json_schema": {"name": "shape", "schema": SCHEMA}},
    )
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    value = json.loads(text)
    assert set(value) == {"count", "kind"}
    assert value["kind"] in ("round", "square")
    assert reason == "stop"


def test_regular_expressions_and_choices(client: openai.OpenAI) -> None:
    for extra in (
        {"guided_regex": "[ab]{4}-[0-9]{2}"},
        {"structured_outputs": {"regex": "[ab]{4}-[0-9]{2}"}},
    ):
        choice = complete(client, **extra)
        assert re.fullmatch("[ab]{4}-[0-9]{2}", choice.text)
        assert choice.finish_reason == "stop"
    words = ["yes", 'no "thanks"', "é"]
    for extra in ({"guided_choice": words}, {"structured_outputs": {"choice": words}}):
        assert complete(client, **extra).text in words
    assert json.loads(complete(client, guided_json=SCHEMA).text)["count"] >= 0


def test_json_object_begins_one(client: openai.OpenAI) -> None:
    choice = complete(client, response_format={"type": "json_object"})
    assert choice.text.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.text), dict)


def test_a_guided_request_in_a_crowd_changes_no_other(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=20, temperature=0)
    with_ignored = {"ignore_eos": True}
    assert len(plain.choices) == 2
    assert complete(client, guided_regex="[xyz]{5}", **with_ignored).finish_reason == "stop"
    again = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=20, temperature=0)
    assert [choice.text for choice in again.choices] == [choice.text for choice in plain.choices]


def test_biases_and_penalties_change_what_is_said(served: Any, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 12, "temperature": 0}
    letter = served.codec.encode("Z")[0]
    forced = client.completions.create(**fields, logit_bias={str(letter): 100})
    assert forced.choices[0].text == "Z" * 12
    once = client.completions.create(
        **fields, logit_bias={str(letter): 30}, frequency_penalty=2, extra_body={"ignore_eos": True}
    )
    assert 1 < once.choices[0].text.count("Z") <= 12
    sampled = client.completions.create(
        **fields | {"temperature": 2, "seed": 1}, extra_body={"min_p": 1.0, "ignore_eos": True}
    )
    greedy = client.completions.create(**fields, extra_body={"ignore_eos": True})
    assert sampled.choices[0].text == greedy.choices[0].text
