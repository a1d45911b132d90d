from __future__ import annotations

import re
from typing import get_args

import pytest

from muster.config.load import parse_run
from muster.config.outline import help_of, keys_of, sections_of
from muster.config.schema import Run
from muster.config.template import Template, render

TEMPLATES = get_args(Template)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_written_file_loads(template: Template) -> None:
    run = parse_run(render("mine", template, "mine.yaml"), "mine.yaml")
    assert run.name == "mine"


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_disabled_keys_are_the_defaults(template: Template) -> None:
    """Enabling every disabled key changes nothing."""
    text = render("mine", template, "mine.yaml")
    enabled = re.sub(r"^( *)#(?=\w)", r"\1", text, flags=re.MULTILINE)
    assert enabled != text
    assert parse_run(enabled, "mine.yaml") == parse_run(text, "mine.yaml")


def test_a_written_file_documents_every_key() -> None:
    text = render("mine", "tiny", "mine.yaml")
    for section in (Run, *sections_of(Run).values()):
        for key in keys_of(section):
            assert re.search(rf"^ *#? *(- )?{key}:", text, re.MULTILINE), key
            assert help_of(section, key)


@pytest.mark.parametrize("name", ["123", "1e5", "0x10"])
def test_names_that_yaml_would_read_as_numbers_are_quoted(name: str) -> None:
    assert parse_run(render(name, "tiny", f"{name}.yaml"), "x").name == name


def test_lines_stay_readable() -> None:
    assert max(map(len, render("mine", "small", "mine.yaml").splitlines())) <= 120
