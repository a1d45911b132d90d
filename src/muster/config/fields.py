"""What the sections of the run file are made of: how strict they are, and the kinds of value."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Discriminator, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False)

# A union is told apart by its shape alone, so that a fault is reported for the branch that was meant.
SectionOrWord = Discriminator(lambda value: "<word>" if isinstance(value, str) else "<section>")
ListOrText = Discriminator(lambda value: "<list>" if isinstance(value, list) else "<text>")
BRANCHES = frozenset({"<section>", "<word>", "<list>", "<text>"})
"""Names of the branches; they occur in the paths of validation errors, but not in the file."""

Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
