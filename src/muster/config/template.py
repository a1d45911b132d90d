"""The commented run file that `muster init` writes: the keys of a template, and below them every other key with its
default, commented out. All comments are the schema's own docstrings, so the file documents everything there is."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from muster.config.load import sections_of, written
from muster.config.schema import Run

_WIDTH = 100

TEMPLATES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {
            "family": "llama",
            "layers": 4,
            "width": 256,
            "heads": 8,
            "kv_heads": 4,
            "context": 256,
            "tied": True,
        },
        "data": {
            "train": [{"files": "stdlib:**/*.py", "exclude": ["**/test/**"]}],
            "tokenizer": {"train": "bpe", "vocab": 4096},
        },
        "train": {"tokens": "1536Ki", "batch_tokens": "4Ki", "optimizer": {"lr": 3e-3}},
    },
    "small": {
        "model": {
            "family": "llama",
            "layers": 8,
            "width": 512,
            "heads": 8,
            "kv_heads": 4,
            "context": 512,
            "tied": True,
        },
        "data": {
            "train": [{"files": "corpus/**/*.txt"}],
            "tokenizer": {"train": "bpe", "vocab": 16_384},
        },
        "train": {
            "tokens": "100M",
            "batch_tokens": "32Ki",
            "optimizer": {"lr": 1e-3},
            "eval_every": "500 steps",
        },
    },
    "finetune": {
        "model": {"from": "path/to/hf-folder"},
        "data": {"train": [{"files": "corpus/**/*.jsonl", "text": "text"}]},
        "train": {"tokens": "10M", "batch_tokens": "32Ki", "sequence": 1024, "optimizer": {"lr": 2e-5}},
    },
}


def render(name: str, template: str) -> str:
    """The text of a run file called `name`."""
    head = f"# A run of muster: `muster train {name}.yaml` trains it. Remove the # of a key to set it.\n"
    return head + "\n".join(_section(Run, {"name": name, **TEMPLATES[template]}, 0)) + "\n"


def _section(owner: Any, values: dict[str, Any], depth: int) -> Iterator[str]:
    """A section's keys: those that the template sets, then the others as comments."""
    pad = "  " * depth
    described = _descriptions(owner)
    below = sections_of(owner)
    for key in [key for key in described if key in values] + [key for key in described if key not in values]:
        section, value = below.get(key), values.get(key)
        yield from (f"{pad}# {line}" for line in textwrap.wrap(described[key], _WIDTH))
        if key in values:
            yield from _entry(key, value, section, depth)
        elif (
            section is not None
            and _default(owner, key) is not None
            and not isinstance(_default(owner, key), str)
        ):
            yield f"{pad}# {key}:"
            yield from (f"{pad}# {line}" for line in _section(section, {}, 1))
        else:
            yield f"{pad}# {key}: {_scalar(_default(owner, key))}"


def _entry(key: str, value: Any, section: Any, depth: int) -> Iterator[str]:
    pad = "  " * depth
    if isinstance(value, dict) and section is not None and len(value) > 0 and key != "tokenizer":
        yield f"{pad}{key}:"
        yield from _section(section, value, depth + 1)
    elif isinstance(value, list) and section is not None:
        yield f"{pad}{key}:"
        for item in value:
            lines = list(_section(section, item, depth + 2))
            first = next(index for index, line in enumerate(lines) if not line.lstrip().startswith("#"))
            yield from lines[:first]
            yield f"{pad}  - {lines[first].lstrip()}"
            yield from lines[first + 1 :]
    else:
        yield f"{pad}{key}: {_scalar(value)}"


def _descriptions(owner: Any) -> dict[str, str]:
    """Keys of a section in order, each with its documentation."""
    documented = owner.__pydantic_fields__
    described = {}
    for field in fields(owner):
        text = documented[field.name].description
        if text is None:
            section = sections_of(owner).get(written(field.name))
            text = (section.__doc__ or "") if section is not None else ""
        described[written(field.name)] = " ".join(text.split())
    return described


def _default(owner: Any, key: str) -> Any:
    field = next(field for field in fields(owner) if written(field.name) == key)
    info = owner.__pydantic_fields__[field.name]
    if info.default_factory is not None:
        return info.default_factory()
    default = info.default
    return None if default is MISSING or repr(default) == "PydanticUndefined" else default


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    text = str(value)
    return f'"{text}"' if isinstance(value, str) and any(mark in text for mark in "*:#{}[],") else text
