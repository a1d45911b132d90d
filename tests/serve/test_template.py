from __future__ import annotations

import json
from pathlib import Path

import pytest

from muster.errors import UsageError
from muster.serve.template import PLAIN, JinjaTemplate, TemplateRefused, template_of

MESSAGES = [{"role": "user", "content": "a <b> & 'c'"}, {"role": "assistant", "content": "ok"}]


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, "utf-8")
    return folder


def test_base_models_get_plain_lines(tmp_path: Path) -> None:
    assert template_of(tmp_path) is PLAIN
    assert template_of(write(tmp_path, tokenizer_config__json={"bos_token": "<s>"})) is PLAIN
    assert PLAIN.render(MESSAGES) == "user: a <b> & 'c'\nassistant: ok\nassistant:"


def test_a_chatml_template_with_special_tokens(tmp_path: Path) -> None:
    source = (
        "{{ bos_token }}{%- for message in messages %}\n"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    config = {"chat_template": source, "bos_token": {"content": "<s>", "lstrip": False}}
    template = template_of(write(tmp_path, tokenizer_config__json=config))
    assert template.render(MESSAGES) == (
        "<s><|im_start|>user\na <b> & 'c'<|im_end|>\n<|im_start|>assistant\nok<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_where_templates_are_found(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    write(tmp_path, tokenizer_config__json={"chat_template": named})
    assert template_of(tmp_path).render([]) == "named"
    write(tmp_path, chat_template__jinja="file")
    assert template_of(tmp_path).render([]) == "file"


def test_names_and_filters_that_templates_expect() -> None:
    source = "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}{{ strftime_now('%Y') | length }}"
    assert JinjaTemplate(source, {}).render(MESSAGES) == '{"role": "user", "content": "a <b> & \'c\'"}4'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "refuses these messages"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_objects_or_misbehaves_is_refused(source: str, message: str) -> None:
    with pytest.raises(TemplateRefused, match=message):
        JinjaTemplate(source, {}).render(MESSAGES)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not valid Jinja"):
        JinjaTemplate("{% for %}", {})
    with pytest.raises(UsageError, match=r"tokenizer_config\.json is not valid JSON"):
        template_of(write(tmp_path, tokenizer_config__json="{"))
