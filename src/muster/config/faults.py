"""The `faults:` section of the run file: what is done when something fails, goes wrong in a step, or is stopped."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from muster.config.fields import STRICT, Flag, Positive
from muster.config.units import Seconds


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Timeouts:
    """How long replica groups wait for each other; each longer than the one before, which it contains."""

    collective: Seconds = 30.0
    """Longest wait for the other groups within one sum, so also how much slower a group may be in one step."""
    vote: Seconds = 45.0
    """Longest time from the first vote on a step to the last; a group without one is ended and started again."""
    quorum: Seconds = 120.0
    """Longest wait at the start for groups that are missing, and for one that saves or hands its state on."""
    supervisor: Seconds = 1800.0
    """Longest time without a committed step before the whole run is ended."""

    @model_validator(mode="after")
    def _nested(self) -> Timeouts:
        names = ("collective", "vote", "quorum", "supervisor")
        for inner, outer in pairwise(names):
            if getattr(self, inner) >= getattr(self, outer):
                raise ValueError(
                    f"{inner} ({getattr(self, inner):g} s) must be shorter than {outer} "
                    f"({getattr(self, outer):g} s), which waits for it: lower {inner}, or raise {outer}"
                )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Faults:
    """What is done when something fails, goes wrong in a step, or is stopped."""

    elastic: Flag = False
    """Each of the layout.replicate copies is a group of ranks that can die and come back while the others go on:
    a step that loses a group is dropped and done again by those that are left, and a group that returns takes the
    state from one of them. Under train.sync (local_sgd or diloco, without warmup, fragments, overlap, mix and compress)
    groups meet every so many steps: what one that dies has learnt since they met is lost, and the others keep
    theirs."""
    timeouts: Timeouts = Field(default_factory=Timeouts)
    restarts: Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)] = 10
    """Restarts in a row without a newly committed checkpoint; each new one makes the budget whole again. Under elastic
    each group has a budget of its own as well, which 10 committed steps in a row make whole; one that has used it is
    given up, and the others go on."""
    grace: Seconds = 25.0
    """Time that ranks have to save and leave when the run is stopped (SIGTERM, SIGINT, SIGUSR1)."""
    hang_after: Seconds = 60.0
    """When no rank has made any progress for this long, and for three times as long as ever before, the run hangs: the
    culprit is named in hang-NNNN.md and the ranks are ended. Setting up, the first step and saving may take ten times
    this. Progress is the pass of a microbatch, or an exchange between ranks."""
    on_nan: Literal["stop", "skip", "rewind"] = "rewind"
    """When the loss or the gradients hold a nan or inf, found before the parameters change. stop: end the run; skip:
    never use that batch again and do the step with the next one; rewind: the same, and where the next batch is bad
    too, so that the parameters are to blame, go back to the newest checkpoint and use none of the batches since.
    After 3 bad steps in a row or 20 in all the run stops. rewind is the default: one bad batch costs one step, and
    only what cannot be mended stops a run. Under train.sync a bad step always stops it."""
    on_spike: Literal["note", "stop", "skip", "rewind"] = "note"
    """When the loss or the gradient norm stands far above the last 64 steps. note: only tell, because most spikes
    pass by themselves; the others as for on_nan."""
    checksum_every: Positive | None = 100
    """Steps between two comparisons of the bits of all copies of parameters and optimizer state, which also come
    before each checkpoint; null for none. What one rank alone holds (shard without replicate) has no copy."""
