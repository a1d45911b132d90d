"""What the fields of requests are made of: text that is text, JSON that is not too deep, prompts of any form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler
from pydantic.functional_validators import AfterValidator, WrapValidator
from pydantic_core import PydanticCustomError

DEEPEST = 100
"""Levels of JSON within JSON."""


def described(should: str) -> WrapValidator:
    """One sentence for a union instead of one error for each of its branches."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("type", "should be {should}", {"should": should}) from None

    return WrapValidator(validate)


def _no_surrogates(text: str) -> str:
    """JSON can escape half a UTF-16 pair, which is no character and cannot be tokenised or sent back."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("text", "holds a lone surrogate, which is not a character")
    return text


def plain(value: Any) -> Any:
    """JSON that others will walk through: not too deep for them, and all of it text that can be written."""
    level = [value]
    for _ in range(DEEPEST):
        for name in (name for one in level if isinstance(one, dict) for name in one):
            _no_surrogates(name)
        for one in level:
            if isinstance(one, str):
                _no_surrogates(one)
        inner = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))
        ]
        level = [one for many in inner for one in many]
        if not level:
            return value
    raise PydanticCustomError("depth", "is nested more than {levels} levels deep", {"levels": DEEPEST})


Text = Annotated[str, AfterValidator(_no_surrogates)]
Plain = AfterValidator(plain)
Schema = Annotated[dict[str, Any] | bool, Plain]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1)]
    | Annotated[list[TokenIds], Field(min_length=1)],
    described(
        "a string, a list of strings, a list of token ids, or a list of lists of token ids, none empty"
    ),
]
Stop = Annotated[
    Text | Annotated[list[Text], Field(max_length=16)] | None,
    described("a string or a list of at most 16 strings"),
]


class Body(BaseModel):
    """Strict, and blind to what it does not know."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


def prompts_of(given: str | Sequence[int] | Sequence[str] | Sequence[list[int]]) -> list[str | list[int]]:
    """One by one, text or token ids."""
    if isinstance(given, str):
        return [given]
    ids = [item for item in given if isinstance(item, int)]
    texts_or_ids = [item for item in given if not isinstance(item, int)]
    return [ids] if ids else texts_or_ids
