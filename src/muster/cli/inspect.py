"""`muster inspect`: what a run, a checkpoint or a model folder holds, and whether its files are sound."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def inspect(path: Path, *, verify: bool = False, json_: bool = False) -> None:
    """Say what a folder is: a run, a checkpoint, or a model in Hugging Face layout.

    Parameters
    ----------
    path
        The folder.
    verify
        Also check every byte against the checksums; exit code 1 names each file that is not sound.
    json_
        Print JSON instead of text.
    """
    from muster.cli._facts import facts_of

    facts = facts_of(path, verify=verify)
    if json_:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        name = key.removesuffix("_bytes").replace("_", " ")
        for line in _lines(key, value):
            sys.stdout.write(f"{name:{width}}  {line}\n")
            name = ""


def _lines(key: str, value: Any) -> Iterator[str]:
    """A fact as people read it; a list or a table takes a line an entry."""
    from muster.observe.format import count, size

    if value is None or value == []:
        yield "-"
    elif isinstance(value, list):
        for entry in value:
            yield "  ".join(
                f"{name.removesuffix('_bytes')} {next(_lines(name, of))}" for name, of in entry.items()
            )
    elif key == "files":
        yield from (f"{name:24}  {size(size_bytes)}" for name, size_bytes in value.items())
    elif isinstance(value, dict):
        yield ", ".join(f"{name} {next(_lines(name, of))}" for name, of in value.items())
    elif key.endswith("_bytes"):
        yield size(value)
    elif key in ("parameters", "trained_tokens"):
        yield f"{count(value)} ({value})"
    elif isinstance(value, float):
        yield f"{value:.4g}"
    else:
        yield str(value)
