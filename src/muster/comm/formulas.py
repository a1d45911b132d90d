"""What a step of ZeRO (Rajbhandari et al. 2020) must send, from shapes alone; the meter has to agree exactly.

Pure arithmetic over the units in which parameters are gathered and gradients reduced. The
table of `parallel/data.py` says how often each happens, that of `comm/choice.py` how.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from muster.comm.choice import Choice, Form
from muster.comm.powersgd import plan
from muster.comm.quantize import encoded_bytes
from muster.comm.traffic import Kind, Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Parameters that are gathered and reduced together."""

    shapes: tuple[tuple[int, ...], ...]
    """Of each parameter's part on one rank, padding included."""
    regathers: bool
    """Dropped after the forward pass, so that ZeRO-3's backward pass gathers it again."""

    @property
    def elements(self) -> int:
        """On one rank."""
        return sum(prod(shape) for shape in self.shapes)


def zero_traffic(
    units: Iterable[Unit],
    *,
    zero: Literal[0, 1, 2, 3],
    shard: int,
    replicate: int,
    microbatches: int,
    parameter_bytes: int,
    choice: Choice,
    of: str = "",
) -> Traffic:
    """One rank's traffic of one step, over the axes `shard` and `replicate`, whose names begin with `of`.

    `parameter_bytes` is the size of one element when gathered; `choice` says in what form gradients travel.
    """
    traffic = Traffic()
    for unit in units:
        gathers = 1 if zero <= 1 else microbatches * (2 if zero == 3 and unit.regathers else 1)
        reduces = 1 if zero <= 1 else microbatches
        for kind, payload in _gather(unit, choice, shard, parameter_bytes) * gathers:
            traffic.count(of + "shard", kind, payload, shard)
        for kind, payload in _scatter(unit, choice, shard) * reduces:
            traffic.count(of + "shard", kind, payload, shard)
        for kind, payload in _between_copies(unit, choice, replicate) * reduces:
            traffic.count(of + "replicate", kind, payload, replicate)
    return traffic


def copies_traffic(messages: Iterable[int], *, copies: int, form: Form) -> Traffic:
    """One rank's traffic for averaging flat fp32 messages of so many elements over `copies` that train apart."""
    traffic = Traffic()
    for elements in messages:
        unit = Unit(shapes=((elements,),), regathers=False)
        for kind, payload in _between_copies(unit, Choice(gradients=form), copies):
            traffic.count("replicate", kind, payload, copies)
    return traffic


_Messages = list[tuple[Kind, int]]


def _gather(unit: Unit, choice: Choice, shard: int, parameter_bytes: int) -> _Messages:
    if shard == 1:
        return []
    part = encoded_bytes(unit.elements) if choice.parameters == "int8" else unit.elements * parameter_bytes
    return [("all-gather", part * shard)]


def _scatter(unit: Unit, choice: Choice, shard: int) -> _Messages:
    if shard == 1:
        return []
    if choice.gradients == "int8":
        return [("all-to-all", encoded_bytes(unit.elements) * shard)]
    return [("reduce-scatter", unit.elements * choice.reduce_dtype.itemsize * shard)]


def _between_copies(unit: Unit, choice: Choice, replicate: int) -> _Messages:
    if replicate == 1:
        return []
    size = choice.reduce_dtype.itemsize
    if choice.gradients == "int8":
        parts = encoded_bytes(-(-unit.elements // replicate)) * replicate
        return [("all-to-all", parts), ("all-gather", parts)]
    if choice.gradients == "powersgd":
        return [("all-reduce", n * size) for n in plan(unit.shapes, choice.rank).messages if n]
    return [("all-reduce", unit.elements * size)]
