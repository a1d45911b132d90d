"""The strict loader: a run file becomes a `Run`, or all of its problems at once, as file:line: path: what.

Reads text (`document.py`), sets overrides, lets the schema check the whole, and says what it
found in the words of the file (`explain.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from muster.config import document
from muster.config.document import KeyPath, Place, Unreadable
from muster.config.explain import explain, path_of
from muster.config.schema import Run
from muster.errors import ConfigError

_MAX_BYTES = 1 << 18
_RUN = TypeAdapter(Run)


def load_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file, apply `key.path=value` overrides, check everything; ConfigError with all problems."""
    return parse_run(_text_of(path), str(path), overrides)


def parse_run(text: str, file: str, overrides: Sequence[str] = ()) -> Run:
    """`load_run` of a text that is at hand; `file` is what its problems call it."""
    draft = _Draft(file, text)
    for said in overrides:
        draft.override(said)
    return draft.check()


def load_resolved(plain: dict[str, Any]) -> Run:
    """Read back what `Run.to_dict` gave (the `run` entry of a run folder's run.json)."""
    draft = _Draft("run.json")
    draft.plain = plain
    return draft.check()


def run_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the run file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _RUN.json_schema(by_alias=True)


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(
                [f"{path}: has more than {_MAX_BYTES} bytes, so it is no run file: give a YAML file"]
            )
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file; `muster init NAME` writes one"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror}): give a YAML file"]) from None


@dataclass(frozen=True, slots=True)
class _Problem:
    path: KeyPath
    what: str
    place: Place | None = None
    override: str | None = None

    def render(self, file: str) -> str:
        where = f"{file}:{self.place[0]}" if self.place else file
        if self.override is not None:
            where = f"override '{self.override}'"
        return ": ".join(part for part in (where, ".".join(map(str, self.path)), self.what) if part)


class _Draft:
    """A run file on its way to a `Run`: remembers where each value came from, and what is wrong."""

    def __init__(self, file: str, text: str | None = None) -> None:
        self.plain: dict[str, Any] = {}
        self._file = file
        self._places: dict[KeyPath, Place] = {}
        self._overrides: dict[KeyPath, str] = {}
        self._problems: list[_Problem] = []
        if text is not None:
            self._read(text)

    def _read(self, text: str) -> None:
        try:
            found = document.read(text)
        except Unreadable as error:
            raise ConfigError([f"{self._file}:{error.line}: {error.what}"]) from None
        if found.plain is None:
            raise ConfigError(
                [f"{self._file}:1: the file is empty; `muster init NAME` writes one to start from"]
            )
        if not isinstance(found.plain, dict):
            raise ConfigError([f"{self._file}:1: should be a mapping with name, model, data and train"])
        self.plain, self._places = found.plain, found.places
        self._problems += [_Problem(path, what, place) for path, place, what in found.faults]

    def override(self, said: str) -> None:
        """Set one value; sections on the way are created."""
        key, equals, text = said.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            self._refuse(said, (), "should have the form key.path=value")
            return
        try:
            value = document.read(text)
        except Unreadable as error:
            if text.lstrip()[:1] in ("[", "{", '"', "'"):
                self._refuse(said, (), error.what)
                return
            value = document.Document(text)  # such as a glob, `**/*.py`, which YAML takes for an alias
        try:
            path = _set(self.plain, names, value.plain)
        except LookupError as error:
            self._refuse(said, (), str(error))
            return
        self._overrides.pop(path, None)
        self._overrides[path] = said  # the latest comes last
        for below, _, what in value.faults:
            self._refuse(said, (*path, *below), what)

    def check(self) -> Run:
        run = None
        try:
            # By alias only: the file says `from`, and `from_` is Python's spelling of it.
            run = _RUN.validate_python(self.plain, by_alias=True, by_name=False)
        except ValidationError as invalid:
            for error in invalid.errors(include_url=False):
                self._find(path_of(error), explain(error))
        if self._problems or run is None:
            # The first fault of a place is its cause; what it led to needs no second sentence.
            first: dict[Any, _Problem] = {}
            for problem in self._problems:
                first.setdefault((problem.path, problem.place, problem.override), problem)
            ordered = sorted(
                first.values(), key=lambda fault: (fault.override is not None, fault.place or (0, 0))
            )
            raise ConfigError([problem.render(self._file) for problem in ordered])
        return run

    def _find(self, path: KeyPath, what: str) -> None:
        # An override answers for what it set, for what is below that, and for the sections it reached into.
        owners = (
            key for key in reversed(self._overrides) if path[: len(key)] == key or key[: len(path)] == path
        )
        said = self._overrides.get(next(owners, ()))
        nearest = (path[:end] for end in range(len(path), -1, -1))
        place = next((self._places[above] for above in nearest if above in self._places), None)
        self._problems.append(_Problem(path, what, None if said else place, said))

    def _refuse(self, said: str, path: KeyPath, what: str) -> None:
        self._problems.append(_Problem(path, what, override=said))


def _set(plain: dict[str, Any], names: Sequence[str], value: Any) -> KeyPath:
    """Put a value where `names` lead; sections on the way are made, list entries must exist."""
    target: Any = plain
    path: KeyPath = ()
    for depth, name in enumerate(names, 1):
        step: str | int = name
        if isinstance(target, list):
            if not (name.isdecimal() and len(name) < 10 and int(name) < len(target)):
                dotted = ".".join(names[: depth - 1])
                raise LookupError(f"{dotted} is a list of {len(target)}, counted from 0, and has no {name}")
            step = int(name)
        path = (*path, step)
        if depth == len(names):
            target[step] = value
        elif isinstance(target, list) or isinstance(target.get(step), dict | list):
            target = target[step]
        else:
            target[step] = target = {}  # `layout: auto` gives way to a mapping
        if not isinstance(target, dict | list):
            raise LookupError(f"{'.'.join(names[:depth])} is no section")
    return path
