"""Which fault strikes when and whom: a pure function of a seed and the run's shape, on a clock of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

from muster.errors import UsageError

Kind = Literal["kill", "stop", "slow", "link", "disk", "flip", "poison"]
KINDS: tuple[Kind, ...] = get_args(Kind)
How = Literal["", "short", "long", "delay", "reset"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a schedule has to know of a run."""

    ranks: int
    patience_s: float
    """How long the run waits for a rank that is silent before it acts: `faults.hang_after`, or `timeouts.vote`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    number: int
    at_s: float
    """Since training began."""
    kind: Kind
    rank: int
    """Whom it strikes, among all ranks of the run."""
    how: How = ""
    """stop: for less (short) or more (long) than the run's patience; link: stalled for so long, delayed, or reset."""
    lasts_s: float = 0.0
    """0 where it is over in an instant."""
    seed: int
    """Decides what is known only at the time: which file and bit, which parameter, which of a rank's links."""


def draw(seed: int, kinds: Sequence[Kind], every_s: float, shape: Shape) -> Iterator[Fault]:
    """Faults without end, in order: a Poisson process of one every `every_s` seconds in the mean.

    Kinds come in rounds, each once a round, so that few faults show many kinds.
    """
    chance = random.Random(f"muster chaos {seed}")
    now = 0.0
    turn: list[Kind] = []
    for number in count(1):
        now += chance.expovariate(1 / every_s)
        turn = turn or chance.sample(list(kinds), len(kinds))
        kind = turn.pop()
        how, lasts_s = _course(kind, every_s, shape, chance)
        yield Fault(
            number=number,
            at_s=now,
            kind=kind,
            rank=chance.randrange(shape.ranks),
            how=how,
            lasts_s=lasts_s,
            seed=chance.randrange(2**31),
        )


def _course(kind: Kind, every_s: float, shape: Shape, chance: random.Random) -> tuple[How, float]:
    lasts_s: dict[How, float] = {
        "short": chance.uniform(0.1, 0.6) * shape.patience_s,
        "long": 4.0 * shape.patience_s,
        "delay": every_s / 2,
        "reset": 0.0,
    }
    hows: dict[Kind, list[How]] = {"stop": ["short", "long"], "link": ["delay", "short", "long", "reset"]}
    if kind in hows:
        how = chance.choice(hows[kind])
        return how, lasts_s[how]
    return "", every_s if kind in ("slow", "disk") else 0.0


def parse_kinds(text: str) -> list[Kind]:
    """`kill,stop,link`; UsageError for a word that is none of KINDS."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in KINDS]
    if unknown or not words:
        raise UsageError(f"--faults should be some of {','.join(KINDS)}, with commas between (got '{text}')")
    return [kind for kind in KINDS if kind in words]
