"""What the schema says about itself: the keys of a section, the sections below it, their help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from pydantic.dataclasses import is_pydantic_dataclass

from muster.config.schema import Run


def keys_of(section: Any) -> list[str]:
    """Keys of a section as a file writes them, in order."""
    return [written(field.name) for field in fields(section)]


def sections_of(section: Any) -> dict[str, Any]:
    """Sections below a section, by key: the dataclass that occurs in a field's type."""
    hints = get_type_hints(section, include_extras=True)
    found = {written(name): next(_dataclasses(hint), None) for name, hint in hints.items()}
    return {name: below for name, below in found.items() if below is not None}


def help_of(section: Any, key: str) -> str:
    """The docstring under a field, or that of the section which it holds."""
    info = next(info for name, info in section.__pydantic_fields__.items() if written(name) == key)
    below = sections_of(section).get(key)
    return " ".join((info.description or (below.__doc__ if below else None) or "").split())


def homes_of(key: str, section: Any = Run, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the sections that have this key."""
    if key in keys_of(section):
        yield path
    for name, below in sections_of(section).items():
        yield from homes_of(key, below, (*path, name))


def written(name: str) -> str:
    """A field's name as a file writes it: `from_` is `from`."""
    return name.rstrip("_")


def _dataclasses(hint: Any) -> Iterator[Any]:
    if isinstance(hint, type) and is_pydantic_dataclass(hint):  # and not a unit, such as Every
        yield hint
        return
    for argument in get_args(hint):
        yield from _dataclasses(argument)
