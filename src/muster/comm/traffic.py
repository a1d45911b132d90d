"""What collectives cost a rank in bytes, by mesh axis and kind.

Two figures for each, exact integers, seen from one rank in a group of n:

    kind            payload_bytes             sent_bytes (bandwidth-optimal algorithm)
    all-reduce      the tensor                2 (n - 1) / n of it, rounded down
    all-gather      the gathered tensor       (n - 1) / n of it
    reduce-scatter  the tensor before         (n - 1) / n of it
    all-to-all      what the rank hands in    all of it but the part for the rank itself
    broadcast       the tensor                all of it: each rank of a chain but the last passes it on
    send            the message               the message; the receiver counts nothing

`payload_bytes` does not depend on the library. `sent_bytes` is what a ring sends
(Patarasuk and Yuan 2009), or whoever sends each part straight to the rank that wants it
(`collectives.py`), and a lower bound for every other algorithm. Summed over the ranks of a run it is the
volume that links carry. Knows no groups and no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "send"]


@dataclass(frozen=True, slots=True)
class Tally:
    """Collectives of one kind over one axis."""

    calls: int = 0
    payload_bytes: int = 0
    sent_bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.calls + other.calls,
            self.payload_bytes + other.payload_bytes,
            self.sent_bytes + other.sent_bytes,
        )

    def __mul__(self, times: int) -> Tally:
        return Tally(self.calls * times, self.payload_bytes * times, self.sent_bytes * times)


class Traffic(dict[tuple[str, Kind], Tally]):
    """Tallies by (axis, kind); two are equal when every figure is."""

    def count(
        self,
        axis: str,
        kind: Kind,
        payload_bytes: int,
        ranks: int,
        *,
        kept_bytes: int | None = None,
        times: int = 1,
    ) -> None:
        """Add `times` equal collectives of a group of `ranks`; `kept_bytes` of an uneven all-to-all stay on this
        rank."""
        sent = sent_bytes(kind, payload_bytes, ranks)
        if kept_bytes is not None:
            sent = payload_bytes - kept_bytes
        if times:
            self._add(axis, kind, Tally(1, payload_bytes, sent) * times)

    def add(self, other: Traffic, *, times: int = 1) -> None:
        """Add all of `other`, `times` times."""
        for (axis, kind), tally in other.items():
            if times:
                self._add(axis, kind, tally * times)

    def sent_bytes_by_axis(self) -> dict[str, int]:
        """What this rank sends over each axis."""
        total: dict[str, int] = {}
        for (axis, _), tally in self.items():
            total[axis] = total.get(axis, 0) + tally.sent_bytes
        return total

    def _add(self, axis: str, kind: Kind, tally: Tally) -> None:
        self[axis, kind] = self.get((axis, kind), Tally()) + tally


def sent_bytes(kind: Kind, payload_bytes: int, ranks: int) -> int:
    """Bytes that one of `ranks` ranks sends for a collective; see the module's table."""
    if kind == "send":
        return payload_bytes
    if ranks == 1:
        return 0
    if kind == "broadcast":
        return payload_bytes
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * (ranks - 1) * payload_bytes // ranks
