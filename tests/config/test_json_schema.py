from __future__ import annotations

import json
import re
from typing import Any

from muster.config.load import parse_run, run_schema
from muster.config.template import render


def definitions() -> dict[str, Any]:
    schema = run_schema()
    return {"Run": {name: part for name, part in schema.items() if name != "$defs"}, **schema["$defs"]}


def test_it_names_its_draft_and_refuses_unknown_keys() -> None:
    assert run_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for name, definition in definitions().items():
        assert definition["additionalProperties"] is False, name


def test_every_key_is_described() -> None:
    found = definitions()
    for name, definition in found.items():
        for key, part in definition["properties"].items():
            referred = found.get(str(part.get("$ref", "")).rpartition("/")[2], {})
            assert part.get("description") or referred.get("description"), f"{name}.{key}"


def test_a_valid_file_has_the_shape_that_it_describes() -> None:
    found = definitions()

    def check(value: dict[str, Any], definition: dict[str, Any]) -> None:
        assert set(definition.get("required", [])) <= value.keys() <= definition["properties"].keys()
        for key, entry in value.items():
            references = re.findall(r'"#/\$defs/(\w+)"', json.dumps(definition["properties"][key]))
            if isinstance(entry, dict):
                check(entry, found[references[0]])

    check(parse_run(render("x", "tiny", "x.yaml"), "x.yaml").to_dict(), found["Run"])
