"""Tools in chat: the guide that makes a reply a call, and the calls in a reply as it comes.

Two forms are read: Hermes' `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere in the text, and a reply
that is nothing but such JSON, one object or a list (Llama 3 writes `parameters`). JSON that is no call of a tool that
was offered stays text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muster.serve.detokenize import overlap

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function to call, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


class ToolReader:
    """Parts a reply into text and calls; text that may yet become a call is held back."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_json: bool | None = None
        """Whether the reply begins as JSON does; None before anything but white space has come."""
        self._called = False

    def push(self, piece: str) -> list[str | ToolCall]:
        """Add text; returns what is certain now."""
        self._held += piece
        if self._is_json is None and self._held.strip():
            self._is_json = self._held.lstrip()[0] in "{["
        if self._is_json is not False:
            return []
        parts: list[str | ToolCall] = []
        while True:
            before, opened, after = self._held.partition(_OPEN)
            if not opened:
                keep = len(self._held) - overlap(self._held, _OPEN)
                parts.append(self._held[:keep])
                self._held = self._held[keep:]
                break
            body, closed, rest = after.partition(_CLOSE)
            parts.append(before)
            self._held = opened + after
            if not closed:
                break
            parts += self._calls(body) or [opened + body + closed]
            self._held = rest
        return self._shown(parts)

    def flush(self) -> list[str | ToolCall]:
        """The rest, when no text follows: a call may lack its end."""
        held, self._held = self._held, ""
        calls = self._calls(held.strip().removeprefix(_OPEN))
        return self._shown([*calls] if calls else [held])

    def _shown(self, parts: Sequence[str | ToolCall]) -> list[str | ToolCall]:
        """Without the white space around calls."""
        shown: list[str | ToolCall] = []
        for part in parts:
            if isinstance(part, ToolCall):
                self._called = True
            elif not part or (self._called and not part.strip()):
                continue
            shown.append(part)
        return shown

    def _calls(self, text: str) -> list[ToolCall]:
        """The calls that a text is; none when it is anything else."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return []
        entries = content if isinstance(content, list) else [content]
        calls = [call for entry in entries if (call := self._call(entry)) is not None]
        return calls if len(calls) == len(entries) else []

    def _call(self, entry: Any) -> ToolCall | None:
        if not isinstance(entry, dict) or entry.get("name") not in self._names:
            return None
        arguments = entry.get("arguments", entry.get("parameters", {}))
        if not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False)
        readable = text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
        return ToolCall(entry["name"], text if readable else json.dumps(arguments))


def call_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of some functions (`name`, and `parameters` as a JSON schema).

    Raises ValueError when two functions define different things under one name.
    """
    definitions: dict[str, Any] = {}
    calls = []
    for function in functions:
        parameters = dict(function.get("parameters") or {"type": "object"})
        for group in ("$defs", "definitions"):  # references are from the root: keep them there
            for name, definition in (parameters.pop(group, None) or {}).items():
                if definitions.setdefault(group, {}).setdefault(name, definition) != definition:
                    raise ValueError(
                        f"two tools define '{name}' differently; give their definitions different names"
                    )
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return definitions | (calls[0] if len(calls) == 1 else {"anyOf": calls})
