"""YAML text as plain data, with the place of every value, and every fault that YAML alone can see.

YAML 1.2 through ruamel's node tree, which keeps the line of every key, shows duplicate keys
and reads `3e-4` as a number. Nothing in a file can name a type to construct. Knows no schema.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

KeyPath = tuple[str | int, ...]
Place = tuple[int, int]
"""Line (from 1) and column of a key or list entry."""

_MAX_DEPTH = 32
_MAX_VALUES = 10_000  # after aliases are followed: a few nested ones could stand for billions
_SCALARS = {"null", "bool", "int", "float", "str", "timestamp"}
_PLAIN_TAGS = _SCALARS | {"map", "seq", "merge"}


class Unreadable(Exception):
    """Text of which nothing can be read; says the line and what is wrong there."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line, self.what = line, what


@dataclass(frozen=True, slots=True)
class Document:
    plain: Any
    """Mappings, lists and scalars; None for an empty text."""
    places: dict[KeyPath, Place] = field(default_factory=dict)
    faults: list[tuple[KeyPath, Place, str]] = field(default_factory=list)
    """What is wrong though readable, such as duplicate keys."""


def read(text: str) -> Document:
    """Read one YAML document; Unreadable where its syntax is broken."""
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise Unreadable(mark.line + 1 if mark is not None else 1, f"not valid YAML: {said}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(line, f"not valid YAML: the character {error.character!r} is not allowed") from None
    except YAMLError as error:
        raise Unreadable(1, f"not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise Unreadable(1, f"nested deeper than {_MAX_DEPTH} levels") from None
    return Document(None) if root is None else _Walk().document(root)


class _Walk:
    """One pass over a node tree."""

    def __init__(self) -> None:
        self._places: dict[KeyPath, Place] = {}
        self._faults: list[tuple[KeyPath, Place, str]] = []
        self._values = 0

    def document(self, root: Node) -> Document:
        return Document(self._value(root, ()), self._places, self._faults)

    def _value(self, node: Node, path: KeyPath) -> Any:
        self._values += 1
        if len(path) > _MAX_DEPTH:  # an alias to its own parent ends here as well
            raise Unreadable(_place(node)[0], f"nested deeper than {_MAX_DEPTH} levels")
        if self._values > _MAX_VALUES:
            raise Unreadable(_place(node)[0], f"stands for more than {_MAX_VALUES} values")
        self._places.setdefault(path, _place(node))
        if _tag(node) not in _PLAIN_TAGS:
            self._fault(path, f"the tag {node.tag} is not accepted: write the plain value")
            return None
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._value(entry, (*path, index)) for index, entry in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        try:
            return _scalar(node)
        except ValueError:
            self._fault(path, "cannot be read as a number")
            return None

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, ScalarNode) else None
            here = (*path, key if key is not None else "?")
            place = _place(key_node)
            if key is None:
                self._faults.append((path, place, "a key should be a word, not a list or mapping"))
            elif _tag(key_node) == "merge":
                self._faults.append((here, place, "merge keys are not supported: write the keys themselves"))
            elif key in plain:
                first, _ = self._places[here]
                self._faults.append((here, place, f"duplicate key (first on line {first})"))
            else:
                self._places[here] = place
                plain[key] = self._value(value_node, here)
        return plain

    def _fault(self, path: KeyPath, what: str) -> None:
        self._faults.append((path, self._places[path], what))


def _scalar(node: ScalarNode) -> Any:
    kind, text = _tag(node), node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("true", "yes", "on", "y")  # the last three only under `%YAML 1.1`
    if kind == "int":
        return int(text.replace("_", ""), 0 if text.lstrip("+-")[:2].lower() in ("0x", "0o") else 10)
    if kind == "float":
        return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _tag(node: Node) -> str:
    prefix, _, kind = str(node.tag).rpartition(":")
    return kind if prefix == "tag:yaml.org,2002" else str(node.tag)


def _place(node: Node) -> Place:
    return node.start_mark.line + 1, node.start_mark.column
