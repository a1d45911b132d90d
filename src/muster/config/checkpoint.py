"""The `checkpoint:` section of the run file: when and where state is saved, and how much of it is kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from muster.config.fields import STRICT, Flag, Positive
from muster.config.units import Every, IntervalAutoOrNone, IntervalOrAuto, Steps


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Checkpoint:
    """When state is saved and how much of it is kept."""

    every: IntervalOrAuto = Field(default_factory=lambda: Every(seconds=120.0))
    """Interval between checkpoints (`2m`, `100 steps`), or auto: from what a save costs and how often the run fails
    (Daly 2006). One is always written at the end."""
    keep: Positive = 3
    """Newest checkpoints kept."""
    keep_every: Steps | None = None
    """Of each so many steps (`1000 steps`), the first checkpoint is kept for good."""
    keep_best: Flag = False
    """A state with the lowest held-out loss so far is saved when it is found (see `train.eval_every`), and kept."""
    memory: IntervalAutoOrNone = "auto"
    """Interval between copies in host memory (`20 steps`, `10s`), which outlive ranks and which these restart from
    without the disk; auto: from what a copy costs and how often the run fails; none: no copies. Needs room for two
    in /dev/shm."""
    replicas: Annotated[int, Field(ge=0, le=8, strict=True)] = 1
    """Further nodes that keep each of those copies, so that it outlives its node too; as far as there are so many."""
