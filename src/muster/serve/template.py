"""Chat messages to one prompt, by the model's own Jinja template or, for base models, as plain lines.

Templates come with the model's files, so they run in Jinja's immutable sandbox, with the names and
settings that `transformers` gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from muster.errors import UsageError

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, both text, and what belongs to calls of tools."""
Tools = Sequence[Mapping[str, Any]]
"""As in OpenAI's API: {"type": "function", "function": {"name", "description", "parameters"}}."""


class TemplateRefused(UsageError):
    """The model's chat template does not accept these messages; the message says why."""


class ChatTemplate(Protocol):
    """Renders messages into a prompt that ends where the assistant's answer begins."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Stop strings that the layout needs."""
        ...

    @property
    def takes_tools(self) -> bool:
        """Whether it shows the model its tools."""
        ...

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> str: ...


class PlainTemplate:
    """For models without a chat template: `role: content` lines, ending in `assistant:`.

    A base model was never trained on it; it answers by continuing the text, up to where it would
    let the user speak again.
    """

    stop = ("\nuser:", "\nsystem:")
    takes_tools = False

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        lines = [f"{message['role']}: {message['content']}" for message in messages]
        return "\n".join([*lines, "assistant:"])


PLAIN = PlainTemplate()


class JinjaTemplate:
    """A Hugging Face `chat_template`, given the special tokens' texts (`bos_token`, `eos_token`, ...)."""

    stop: tuple[str, ...] = ()

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError  # not needed where the engine runs
        from jinja2.ext import loopcontrols
        from jinja2.meta import find_undeclared_variables
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json  # Jinja's own escapes HTML
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise UsageError(f"the model's chat template is not valid Jinja: {error}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """The prompt; raises TemplateRefused when the template objects or fails."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # whatever a template's expressions can raise
            raise TemplateRefused(f"the model's chat template refuses these messages: {error}") from error


def template_of(folder: Path) -> ChatTemplate:
    """The template of a model folder: chat_template.jinja, else tokenizer_config.json's, else plain lines."""
    config = read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return PLAIN
    return JinjaTemplate(source, _special_tokens(config))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model folder; {} when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} should hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
