"""The commented run file that `muster init` writes: a template's keys, and every other key disabled.

All comments are the schema's own docstrings and all disabled keys show their defaults, so the
file documents everything there is.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal

from muster.config import document
from muster.config.outline import help_of, keys_of, sections_of
from muster.config.schema import Run

Template = Literal["tiny", "small", "finetune"]

_WIDTH = 100
_ON_ONE_LINE = (
    "tokenizer",
    "layout",
    "sync",
)  # a section or another value; what the section may hold is told above it
_HEAD = """\
# A run of muster; train it with `muster train {file}`.
# A key after a bare # shows its default: to change it, remove the # (and that of its section, if it has one).
"""

_TEMPLATES: dict[Template, dict[str, Any]] = {
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
            "train": [{"files": "stdlib:**/*.py", "exclude": ["**/test/**", "**/tests/**"]}],
            "held_out": "2%",
            "tokenizer": {"train": "bpe", "vocab": 4096},
        },
        "train": {
            "tokens": "1536Ki",
            "batch_tokens": "4Ki",
            "optimizer": {"lr": 3e-3},
            "schedule": {"kind": "cosine", "warmup": "5%", "floor": "5%"},
        },
        "checkpoint": {"every": "60s"},
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
            "held_out": "1%",
            "tokenizer": {"train": "bpe", "vocab": 16_384},
        },
        "train": {
            "tokens": "100M",
            "batch_tokens": "32Ki",
            "optimizer": {"lr": 1e-3},
            "schedule": {"kind": "cosine", "warmup": "2%"},
            "eval_every": "500 steps",
        },
    },
    "finetune": {
        "model": {"from": "path/to/hf-folder"},
        "data": {"train": [{"files": "corpus/**/*.jsonl", "text": "text"}], "held_out": "1%"},
        "train": {
            "tokens": "10M",
            "batch_tokens": "32Ki",
            "sequence": 1024,
            "optimizer": {"lr": 2e-5, "weight_decay": 0.0},
            "schedule": {"kind": "linear", "warmup": "3%", "floor": "0%"},
        },
    },
}


def render(name: str, template: Template, file: str) -> str:
    """The text of a run file for a run called `name`; `file` is where it will lie."""
    body = _lines(Run, {"name": name, **_TEMPLATES[template]}, depth=0)
    return _HEAD.format(file=file) + "\n" + "\n".join(body) + "\n"


def _lines(section: Any, values: dict[str, Any] | None, depth: int) -> Iterator[str]:
    """The keys of a section: those with a value first; all disabled where the section itself is (None)."""
    given = values or {}
    for key in sorted(keys_of(section), key=lambda key: key not in given):
        pad = "  " * depth
        below = sections_of(section).get(key)
        yield from _prose(pad, help_of(section, key))
        if key in _ON_ONE_LINE:
            for part in keys_of(below):
                yield from _prose(pad, f"{part}: {help_of(below, part)}", indent=2)
        if key in given:
            yield from _entry(pad, key, given[key], below, depth)
        elif isinstance(default := _default(section, key), dict):
            yield f"{pad}#{key}:"
            yield from _lines(below, None, depth + 1)
        else:
            yield f"{pad}#{key}: {_flow(default)}"
        if depth == 0:
            yield ""


def _prose(pad: str, text: str, indent: int = 0) -> list[str]:
    first = f"{pad}# {' ' * indent}"
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=first + " " * indent)


def _entry(pad: str, key: str, value: Any, below: Any, depth: int) -> Iterator[str]:
    if below is None or key in _ON_ONE_LINE:
        yield f"{pad}{key}: {_flow(value)}"
        return
    yield f"{pad}{key}:"
    if isinstance(value, dict):
        yield from _lines(below, value, depth + 1)
        return
    for item in value:
        lines = list(_lines(below, item, depth + 2))
        # The dash stands before the first key; the comments above it stay where they are.
        first = next(index for index, line in enumerate(lines) if not line.lstrip().startswith("#"))
        lines[first] = f"{pad}  - {lines[first].lstrip()}"
        yield from lines


def _default(section: Any, key: str) -> Any:
    """A key's default as plain data; None where there is none."""
    info = next(info for name, info in section.__pydantic_fields__.items() if name.rstrip("_") == key)
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    if default is None or isinstance(default, str | int | float | list | tuple):
        return default
    return {} if sections_of(section).get(key) else str(default)


def _flow(value: Any) -> str:
    """Plain data on one line of YAML, quoted where it would be read as something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(entry) for entry in value) + "]"
    if isinstance(value, str):
        return value if _reads_back(value) else json.dumps(value)
    return "null" if value is None else str(value).lower()


def _reads_back(text: str) -> bool:
    try:
        return bool(document.read(f"[{text}]").plain == [text])
    except document.Unreadable:
        return False
