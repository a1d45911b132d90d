"""What a checkpoint of another trainer is here: how far it was trained, and its tensors by our names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Protocol

from muster.errors import CheckpointError, UsageError
from muster.model.spec import TransformerSpec
from muster.model.transformer import Value

Kind = Literal["weights", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weights", "exp_avg", "exp_avg_sq")

_FREE = ("family", "vocab", "context")
"""Names of one architecture differ, vocabularies are padded, and a context may be cut."""


class Source(Protocol):
    """One checkpoint."""

    @property
    def label(self) -> str:
        """What it is, for people."""

    @property
    def steps(self) -> int:
        """Updates that the optimizer has done."""

    @property
    def spec(self) -> TransformerSpec | None:
        """The model, where the checkpoint says what it is."""

    @property
    def missing_moments(self) -> str | None:
        """Why the moments cannot be had, or None where they can."""

    def values(self, kind: Kind, spec: TransformerSpec) -> Value:
        """Tensors of a kind in fp32, for a model of `spec`; those of another model are refused."""


def refuse_other_model(said: TransformerSpec, wanted: TransformerSpec, where: str) -> None:
    """UsageError where two specifications are of different models, although their tensors may have the same shapes."""
    differences = [
        f"{field.name} {getattr(said, field.name)!r} instead of {getattr(wanted, field.name)!r}"
        for field in fields(said)
        if field.name not in _FREE and getattr(said, field.name) != getattr(wanted, field.name)
    ]
    if differences:
        raise UsageError(f"{where} is of another model: it has {', '.join(differences[:3])}")


def whole_number(table: Mapping[str, Any], key: str, where: Path) -> int:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{where}: {key} is {value!r} instead of a number: copy it again")
    return value


@contextmanager
def understood(where: object) -> Iterator[None]:
    """Within, a structure that is not as expected is an error of the checkpoint."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{where} is laid out in no way that is known here ({type(error).__name__}: {error}): copy it again, or "
            f"save it with a newer version of its trainer"
        ) from None


def table(content: Any, where: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds no table where one is expected: copy it again")
    return content
