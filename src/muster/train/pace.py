"""When a checkpoint is due: at the interval that the run file says, or at one found from what saves cost."""

from __future__ import annotations

import os
import time
from typing import Literal

from muster.checkpoint import interval
from muster.config.units import Every
from muster.observe.records import EVENTS, read_jsonl
from muster.parallel.world import World
from muster.train.clock import Alarm
from muster.train.plan import Training
from muster.train.report import Report

_FIRST_S = {"every": interval.FIRST_S, "memory": 10.0}


class Pace:
    """Only the first rank's counts: ask it there."""

    def __init__(
        self, plan: Training, world: World, report: Report, *, key: Literal["every", "memory"] = "every"
    ) -> None:
        """`key` of the section `checkpoint` that states the interval."""
        every = getattr(plan.run.checkpoint, key)
        self._report, self._key = report, key
        self._auto = every == "auto"
        self._told = False
        self._alarm = Alarm(Every(seconds=_FIRST_S[key]) if self._auto else every)
        self._machines = max(world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)), 1)
        self._past = interval.history(read_jsonl(plan.folder / EVENTS) if self._auto else [])
        self._since = time.monotonic()

    def rings(self, step: int) -> bool:
        return self._alarm.rings(step)

    def measured(self, stall_s: float, duration_s: float) -> None:
        """A save stalled training so long, and was on disk after `duration_s`: under `auto`, choose anew."""
        if not self._auto:
            return
        seconds, reason = interval.choose(
            cost_s=stall_s,
            duration_s=duration_s,
            past=self._past,
            machines=self._machines,
            running_s=time.monotonic() - self._since,
        )
        self._alarm.change(Every(seconds=seconds))
        sentence = f"checkpoint.{self._key}: auto is {seconds:.3g} s ({reason})"
        if self._told or self._key == "memory":  # copies in memory are seen by nobody but who needs them
            self._report.event("checkpoint-interval", message=sentence, seconds=seconds)
        else:
            self._report.note("checkpoint-interval", sentence, seconds=seconds)
        self._told = True
