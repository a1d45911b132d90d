"""Requests of OpenAI's completions and chat API, as pydantic models.

Three ways to treat a field, each on purpose: what works is declared; what would change the answer
but does not work here is declared and refused unless it is at its default (a client must not
believe that it was obeyed); everything else (`metadata`, `store`,
...) cannot change the answer and is ignored. `top_k` and `ignore_eos` are extensions that other
servers have too, as are the words for structured output that are not OpenAI's, `priority` and the
requests about tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from muster.serve.fields import Body, Prompts, Schema, Stop, Text, prompts_of
from muster.serve.messages import ChatMessage, ChosenTool, Tool, ToolChoice
from muster.serve.protocol import Guide
from muster.serve.relay import Relay
from muster.serve.tools import call_schema


class StreamOptions(Body):
    include_usage: bool | None = None


class JsonSchema(Body):
    name: Text | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = True
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("value", "of type json_schema needs json_schema with a schema")
        return self


Choices = Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1000)]


class StructuredOutputs(Body):
    """What the answer must be, in vLLM's words; one of them."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Annotated[Text, Field(max_length=10_000)] | None = None
    choice: Choices | None = None


class SamplingFields(Body):
    """What the two endpoints share; null always means the default."""

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    """Extension: 0 or -1 keeps every token."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = None
    ignore_eos: bool | None = None
    """Extension: generate `max_tokens` even beyond the end of sequence."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=1024),
        ]
        | None
    ) = None
    """By token id, as in OpenAI's API."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Extension, as the next one."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Logits are divided by it: by next to nothing, they would overflow."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """Extension in vLLM's words, as the three older ones that follow."""
    guided_json: Schema | None = None
    guided_regex: Annotated[Text, Field(max_length=10_000)] | None = None
    guided_choice: Choices | None = None
    relay: Relay | None = None
    """Extension, see serve/relay.py: what another replica has delivered of this answer."""
    user: Annotated[Text, Field(max_length=512)] | None = None
    """For whom: within a priority, users are served alike (of keys that are trusted)."""
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    """Extension: smaller goes first; below 0 only with a key that is trusted."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping):
            for name, neutral in cls._neutral().items():
                if fields.get(name) is not None and fields[name] not in neutral:
                    raise PydanticCustomError(
                        "unsupported",
                        "{param} is not supported by this server; leave it out",
                        {"param": name},
                    )
        return fields

    @classmethod
    def _neutral(cls) -> dict[str, tuple[Any, ...]]:
        return {}

    @property
    def guides(self) -> dict[str, Guide]:
        """What the answer must be, by the name of the field that says so."""
        given: dict[str, Guide] = {}
        form, outputs = self.response_format, self.structured_outputs
        if form is not None and form.type != "text":
            schema = form.json_schema.schema_ if form.json_schema else {"type": "object"}
            given["response_format"] = Guide("json", json.dumps(schema))
        if outputs is not None:
            for kind, value in (
                ("json", outputs.json_),
                ("regex", outputs.regex),
                ("choice", outputs.choice),
            ):
                if value is not None:
                    given[f"structured_outputs.{kind}"] = _guide(kind, value)
        for kind, value in (
            ("json", self.guided_json),
            ("regex", self.guided_regex),
            ("choice", self.guided_choice),
        ):
            if value is not None:
                given[f"guided_{kind}"] = _guide(kind, value)
        return given

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def _guide(kind: str, value: Any) -> Guide:
    text = value if kind == "regex" else json.dumps(value)
    return Guide(cast(Literal["json", "regex", "choice"], kind), text)


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Report this many most likely tokens at each position."""
    echo: bool | None = None
    """Put the prompt in front of the completion (without log-probabilities)."""
    best_of: int | None = None
    suffix: str | None = None

    @classmethod
    def _neutral(cls) -> dict[str, tuple[Any, ...]]:
        return {**super()._neutral(), "best_of": (1,), "suffix": ("",)}

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "unsupported", "{param} cannot be combined with logprobs on this server", {"param": "echo"}
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, text or token ids."""
        return prompts_of(self.prompt)


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of max_tokens; wins over it. Neither: up to the end of the context."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice = None
    functions: list[Any] | None = None

    @classmethod
    def _neutral(cls) -> dict[str, tuple[Any, ...]]:
        return {**super()._neutral(), "functions": ([],)}

    @model_validator(mode="after")
    def _is_consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("value", "{param} needs logprobs to be true", {"param": "top_logprobs"})
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("value", "{param} name a function twice", {"param": "tools"})
        wanted = self._wanted
        if wanted is not None and not set(wanted) & set(names):
            raise PydanticCustomError(
                "value", "{param} asks for a tool that tools does not offer", {"param": "tool_choice"}
            )
        return self

    @property
    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def _wanted(self) -> list[str] | None:
        """Names of the functions one of which must be called; None: none must."""
        if isinstance(self.tool_choice, ChosenTool):
            return [self.tool_choice.function.name]
        return [tool.function.name for tool in self.tools or ()] if self.tool_choice == "required" else None

    @property
    def guides(self) -> dict[str, Guide]:
        given, wanted = super().guides, self._wanted
        if wanted is not None:
            functions = [
                tool.function.model_dump(exclude_none=True)
                for tool in self.tools or ()
                if tool.function.name in wanted
            ]
            given["tool_choice"] = Guide("json", json.dumps(call_schema(functions)))
        return given


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: Text
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    """All of them; a model's hidden state cannot be cut short."""
    user: Annotated[Text, Field(max_length=512)] | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None


class TokenizeRequest(Body):
    """POST /tokenize, of a text or of a chat."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    """Of a text: begin it as a prompt of /v1/completions; so by default."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError(
                "value", "{param} or messages should be given, one of them", {"param": "prompt"}
            )
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
