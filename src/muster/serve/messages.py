"""What a chat is made of: its messages, the calls of tools in them, and the tools on offer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.functional_validators import AfterValidator
from pydantic_core import PydanticCustomError

from muster.serve.fields import Body, Plain, Text, described, plain


class TextPart(Body):
    type: Literal["text"]
    text: Text


def _arguments(text: str) -> str:
    """Templates write a call's arguments out one by one."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise PydanticCustomError("value", "should be the text of a JSON object")
    plain(content)
    return text


class CalledFunction(Body):
    name: Text
    arguments: Annotated[Text, AfterValidator(_arguments)]


class MadeCall(Body):
    """A call that the model has made earlier."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Text | list[TextPart] | None, described("a string or a list of {type: text, text: ...} parts")
    ] = None
    name: Text | None = None
    tool_calls: list[MadeCall] | None = None
    tool_call_id: Text | None = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    @property
    def plain(self) -> dict[str, Any]:
        """What a chat template gets."""
        plain: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.name is not None:
            plain["name"] = self.name
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": call.id or "",
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return plain


class OfferedFunction(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: Annotated[dict[str, Any], Plain] | None = None


class Tool(Body):
    type: Literal["function"]
    function: OfferedFunction

    @property
    def plain(self) -> dict[str, Any]:
        """What a chat template gets."""
        function = self.function.model_dump(exclude_none=True)
        return {"type": "function", "function": function}


class FunctionName(Body):
    name: Text


class ChosenTool(Body):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | ChosenTool | None,
    described("none, auto, required, or {type: function, function: {name: ...}}"),
]
