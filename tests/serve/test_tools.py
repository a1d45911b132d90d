"""Calls of tools: read from replies however they are cut, and forced by a guide, with the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muster.serve.template import JinjaTemplate
from muster.serve.tools import ToolCall, ToolReader, call_schema

TEMPLATE = (
    "{% if tools %}[{{ tools | map(attribute='function') | map(attribute='name') | join(',') }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}"
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}, "days": {"$ref": "#/$defs/few"}},
            "required": ["unit", "days"],
            "additionalProperties": False,
            "$defs": {"few": {"enum": [1, 2]}},
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
ASK: Any = [{"role": "user", "content": "?"}]

CALL = ToolCall("weather", '{"days": 1}')


def read(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolReader({"weather", "time"})
    found = [part for piece in pieces for part in reader.push(piece)] + reader.flush()
    text = "".join(part for part in found if isinstance(part, str))
    return text, [part for part in found if isinstance(part, ToolCall)]


@pytest.mark.parametrize(
    ("reply", "text", "calls"),
    [
        ("just text < and <tool", "just text < and <tool", []),
        ('<tool_call>\n{"name": "weather", "arguments": {"days": 1}}\n</tool_call>', "", [CALL]),
        ('Let me see.<tool_call>{"name": "weather", "arguments": {"days": 1}}', "Let me see.", [CALL]),
        (
            '<tool_call>{"name": "weather", "arguments": {"days": 1}}</tool_call>\n'
            '<tool_call>{"name": "time"}</tool_call>\n',
            "",
            [CALL, ToolCall("time", "{}")],
        ),
        ('{"name": "weather", "parameters": {"days": 1}}', "", [CALL]),
        (
            ' [{"name": "weather", "arguments": {"days": 1}}, {"name": "time"}]',
            "",
            [CALL, ToolCall("time", "{}")],
        ),
        ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
        ('{"answer": 42}', '{"answer": 42}', []),
        ('so: {"name": "time"}', 'so: {"name": "time"}', []),
        ("<tool_call>not json</tool_call> after", "<tool_call>not json</tool_call> after", []),
        ('<tool_call>{"name": "time", "arguments": "x"}</tool_call>', None, []),
        ("[" * 5000, "[" * 5000, []),
        ('{"name": "time", "arguments": {"a": "\\ud800"}}', "", [ToolCall("time", '{"a": "\\ud800"}')]),
        ('{"name": "time", "arguments": {"a": "é"}}', "", [ToolCall("time", '{"a": "é"}')]),
        ("", "", []),
    ],
)
def test_replies(reply: str, text: str | None, calls: list[ToolCall]) -> None:
    expected = reply if text is None else text
    assert read([reply]) == (expected, calls)
    assert read(list(reply)) == (expected, calls)


@given(st.data())
def test_no_cut_changes_what_is_read(data: st.DataObject) -> None:
    words = ["<tool_call>", "</tool_call>", '{"name": "time"}', " ", "<", "x", "{", "[", "\n", "tool_call>"]
    reply = "".join(data.draw(st.lists(st.sampled_from(words), max_size=8)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(reply)), max_size=6)))
    pieces = [reply[start:end] for start, end in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    assert read(pieces) == read([reply])


def test_definitions_stay_where_references_find_them() -> None:
    schema = call_schema([WEATHER["function"], TIME["function"]])
    assert schema["$defs"] == {"few": {"enum": [1, 2]}}
    assert [call["properties"]["name"]["const"] for call in schema["anyOf"]] == ["weather", "time"]
    other = {"name": "other", "parameters": {"$defs": {"few": {"type": "string"}}}}
    with pytest.raises(ValueError, match="two tools define 'few' differently"):
        call_schema([WEATHER["function"], other])


@pytest.fixture(scope="module")
def tooled(serving: Any, make_model: Any) -> Iterator[Any]:
    with serving(make_model(context=400), template=JinjaTemplate(TEMPLATE, {})) as served:
        yield served


@pytest.fixture
def asking(tooled: Any, connect: Any) -> openai.OpenAI:
    client: openai.OpenAI = connect(tooled)
    return client


def test_the_template_gets_tools_calls_and_results(tooled: Any, asking: openai.OpenAI) -> None:
    call: Any = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"days":1}'}}
    messages: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    rendered = '[weather]<user>?<assistant>weather{"days": 1}<tool>sun'
    fields = {"model": "tiny", "messages": messages, "tools": [WEATHER]}
    told = httpx.post(f"{tooled.url}/tokenize", json=fields).json()
    assert tooled.codec.decode(told["tokens"]) == rendered
    answer = asking.chat.completions.create(**fields, max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(rendered)
    without = asking.chat.completions.create(**fields, max_tokens=3, tool_choice="none")
    assert without.usage is not None
    assert without.usage.prompt_tokens == len(rendered) - len("[weather]")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_forced(asking: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": ASK,
        "tools": [WEATHER],
        "tool_choice": choice,
        "temperature": 0,
    }
    answer = asking.chat.completions.create(**fields).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert answer.message.tool_calls is not None
    call: Any = answer.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "weather"
    assert arguments["unit"] in ("C", "F")
    assert arguments["days"] in (1, 2)
    chunks = list(asking.chat.completions.create(**fields, stream=True))
    made = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(one.index, one.function.name, json.loads(one.function.arguments)) for one in made] == [
        (0, "weather", arguments)
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_one_of_several_tools_must_be_called(asking: openai.OpenAI) -> None:
    answer = asking.chat.completions.create(
        model="tiny", messages=ASK, tools=[WEATHER, TIME], tool_choice="required", n=4, seed=3
    )
    for choice in answer.choices:
        if choice.finish_reason == "tool_calls":  # or the context has ended
            assert choice.message.tool_calls is not None
            call: Any = choice.message.tool_calls[0]
            assert call.function.name in ("weather", "time")


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools", "name a function twice"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "is required"),
        ({"tools": [{"type": "code", "function": {}}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "match pattern"),
        ({"tools": [TIME] * 129}, "tools", "at most 128"),
        ({"tool_choice": "required"}, "tool_choice", "does not offer"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "does not"),
        ({"tools": [TIME], "tool_choice": "always"}, "tool_choice", "none, auto, required"),
        ({"tools": [TIME], "tool_choice": "required", "guided_regex": "a"}, "guided_regex", "contradict"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "nonsense"}}}],
             "tool_choice": "required"},
            "tool_choice",
            "Invalid type: nonsense",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]}]},
            "messages.0.tool_calls.0.function.arguments",
            "the text of a JSON object",
        ),
        ({"functions": [{"name": "old"}]}, "functions", "not supported"),
    ],
)  # fmt: skip
def test_wrong_tools(tooled: Any, changes: dict[str, Any], param: str, message: str) -> None:
    fields = {"model": "tiny", "messages": ASK, "max_tokens": 2} | changes
    answer = httpx.post(f"{tooled.url}/v1/chat/completions", json=fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert message in error["message"]


def test_a_template_that_knows_no_tools_is_not_given_any(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="chat template knows no tools"):
        client.chat.completions.create(model="tiny", messages=ASK, tools=[TIME])
