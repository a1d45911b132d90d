"""What a validation found, in plain words: one sentence a fault, and the name that was probably meant."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic_core import ErrorDetails

from muster.config.document import KeyPath
from muster.config.fields import BRANCHES
from muster.config.outline import help_of, homes_of, keys_of, sections_of
from muster.config.schema import Run

_LATER: dict[KeyPath, frozenset[str]] = {
    (): frozenset({"distill", "quantize", "swarm", "plan", "observe", "launch"}),
    ("checkpoint",): frozenset({"async"}),
    ("export",): frozenset({"to"}),
    ("serve",): frozenset({"queue_tokens", "keys"}),
}
_SHOULD_BE = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "greater_than": "more than {gt:.15g}",
    "greater_than_equal": "at least {ge:.15g}",
    "less_than": "less than {lt:.15g}",
    "less_than_equal": "at most {le:.15g}",
    "string_pattern_mismatch": "letters, digits, '.', '_' or '-', the first a letter or digit",
}


def path_of(error: ErrorDetails) -> KeyPath:
    """Where the fault is, in the words of the file (pydantic also names the branch of a union)."""
    return tuple(part for part in error["loc"] if part not in BRANCHES)


def explain(error: ErrorDetails) -> str:
    """One validation error as `should be ... (got ...)`, `required` or `unknown key - ...`."""
    kind, path = error["type"], path_of(error)
    if kind == "unexpected_keyword_argument":
        return unknown_key(path)
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return "required"
    got = f"(got {_shown(error['input'])})"
    wrong_kind = kind in ("dataclass_type", "literal_error", "string_type")
    if wrong_kind and error["loc"][-1] in ("<section>", "<word>"):
        return f"should be {_choices(path)} {got}"
    if kind == "dataclass_type":
        return f"should be a section with keys such as {', '.join(keys_of(_section(path))[:3])} {got}"
    context = error.get("ctx", {})
    if kind == "value_error":
        said = str(context["error"])
        # A check of a whole section says its own figures.
        return said if isinstance(error["input"], dict) else f"{said} {got}"
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "")
        close = difflib.get_close_matches(str(error["input"]), choices.replace(" or ", ", ").split(", "), n=1)
        return f"should be {choices} {got}" + (f" - did you mean '{close[0]}'?" if close else "")
    if kind in ("too_short", "too_long"):
        limit = (
            f"at least {context.get('min_length')}"
            if kind == "too_short"
            else f"at most {context.get('max_length')}"
        )
        return f"should have {limit} entries {got}"
    if kind in _SHOULD_BE:
        return f"should be {_SHOULD_BE[kind].format(**context)} {got}"
    return f"{error['msg']} {got}"


def unknown_key(path: KeyPath) -> str:
    """Why the last key of `path` is not known: a later version's, a slip of the pen, or another section's."""
    key, section = str(path[-1]), path[:-1]
    if key in _LATER.get(section, ()):
        return "not in this version of muster: remove it"
    known = keys_of(_section(section))
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"unknown key - did you mean '{close[0]}'?"
    homes = [".".join(home) or "the top level" for home in homes_of(key)]
    if homes:
        return f"unknown key - '{key}' belongs in {' or '.join(homes)}"
    return f"unknown key - known here: {', '.join(known)}"


def _choices(path: KeyPath) -> str:
    """The first sentence of a key's help, which for a union lists its branches."""
    help_text = help_of(_section(path[:-1]), str(path[-1]))
    return help_text.split(". ")[0].removesuffix(".").replace("`", "")


def _section(path: KeyPath) -> Any:
    """The dataclass of the section at `path`, or of the nearest one above it."""
    owner: Any = Run
    for part in path:
        if isinstance(part, str):
            owner = sections_of(owner).get(part, owner)
    return owner


def _shown(value: Any) -> str:
    """A value as the file would write it, cut where it is long."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
