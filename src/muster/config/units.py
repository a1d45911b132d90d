"""Human units in run files: `1.5M` tokens, `2m` of time, `2%` of a whole, read once and kept as numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

_COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SECONDS: dict[str, int | Decimal] = {"": 1, "ms": Decimal("0.001"), "s": 1, "m": 60, "h": 3600, "d": 86400}
_QUANTITY = re.compile(r"\s*([0-9][0-9_]{0,30}(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,3})?)\s*([a-zA-Z%]*)\s*")
_MOST = 10**18


def _split(value: object, example: str) -> tuple[Decimal, str]:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"should be a quantity such as {example}")
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"should be a quantity such as {example}")
    number = Decimal(match[1].replace("_", ""))
    if number > _MOST:
        raise ValueError(f"should be at most {_MOST:.0e}")
    return number, match[2]


def parse_count(value: object) -> int:
    """`4k` -> 4000, `4Ki` -> 4096, `1.5M` -> 1500000, `2B` -> 2000000000; refuses fractions of one."""
    number, unit = _split(value, "4096, 4k, 4Ki, 1.5M or 2B")
    if unit.lower() not in _COUNT:
        raise ValueError(f"unknown unit '{unit}': use k, M, B, T or Ki, Mi, Gi")
    count = number * _COUNT[unit.lower()]
    if count > _MOST:
        raise ValueError(f"should be at most {_MOST:.0e}")
    if count % 1:
        raise ValueError(f"should be a whole number, but is {count:.15g}")
    return int(count)


def parse_seconds(value: object) -> float:
    """`90` -> 90.0, `2m` -> 120.0, `500ms` -> 0.5."""
    number, unit = _split(value, "30s, 2m or 1h")
    if unit.lower() not in _SECONDS:
        raise ValueError(f"unknown unit '{unit}': use ms, s, m, h or d")
    return float(number * _SECONDS[unit.lower()])


def parse_fraction(value: object) -> float:
    """`2%` -> 0.02, `0.02` -> 0.02; must lie between 0 and 1."""
    number, unit = _split(value, "2% or 0.02")
    if unit not in ("", "%"):
        raise ValueError(f"unknown unit '{unit}': use % or a number from 0 to 1")
    fraction = float(number / 100 if unit == "%" else number)
    if not 0 <= fraction <= 1:
        raise ValueError(f"should lie between 0% and 100%, but is {fraction * 100:.4g}%")
    return fraction


@dataclass(frozen=True, slots=True)
class Every:
    """An interval: a number of steps or a length of time, whichever of the two was written."""

    steps: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:.15g}s"


def parse_every(value: object) -> Every:
    """`100 steps` -> Every(steps=100), `2m` -> Every(seconds=120.0)."""
    if isinstance(value, Every):
        return value
    example = "2m, 30s or 100 steps"
    number, unit = _split(value, example)
    if unit == "":
        raise ValueError(f"should say its unit: for example {example}")
    if not number:
        raise ValueError("should be more than 0")
    if unit in ("step", "steps"):
        return Every(steps=parse_count(str(number)))
    if unit.lower() not in _SECONDS:
        raise ValueError(f"unknown unit '{unit}': use ms, s, m, h, d or steps")
    return Every(seconds=parse_seconds(value))


def parse_every_or_auto(value: object) -> Every | Literal["auto"]:
    """`auto`, or as `parse_every`."""
    return "auto" if value == "auto" else parse_every(value)


def parse_every_auto_or_none(value: object) -> Every | Literal["auto", "none"]:
    """`none`, `auto`, or as `parse_every`."""
    return "none" if value == "none" else parse_every_or_auto(value)


def parse_steps(value: object) -> Every:
    """`1000 steps`, and no length of time."""
    every = parse_every(value)
    if every.steps is None:
        raise ValueError(f"counts steps: for example 1000 steps, not {value}")
    return every


def _quantity(kind: str, pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind, "minimum": 0}, {"type": "string", "pattern": pattern}]})


Tokens = Annotated[
    int,
    BeforeValidator(parse_count),
    Field(ge=1),
    _quantity("integer", r"^[0-9._]+([eE][0-9]+)? ?([kKmMbBtT]|[kKmMgG]i)?$"),
]
Seconds = Annotated[
    float, BeforeValidator(parse_seconds), Field(gt=0), _quantity("number", r"^[0-9._]+ ?(ms|s|m|h|d)?$")
]
Fraction = Annotated[float, BeforeValidator(parse_fraction), _quantity("number", r"^[0-9.]+ ?%?$")]
Interval = Annotated[
    Every,
    BeforeValidator(parse_every),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9._]+ ?(ms|s|m|h|d|steps?)$"}),
]
Steps = Annotated[
    Every,
    BeforeValidator(parse_steps),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^[0-9._]+ ?steps?$"}),
]
IntervalOrAuto = Annotated[
    Every | Literal["auto"],
    BeforeValidator(parse_every_or_auto),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^([0-9._]+ ?(ms|s|m|h|d|steps?)|auto)$"}),
]
IntervalAutoOrNone = Annotated[
    Every | Literal["auto", "none"],
    BeforeValidator(parse_every_auto_or_none),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": r"^([0-9._]+ ?(ms|s|m|h|d|steps?)|auto|none)$"}),
]
