"""The guard: judges each step before the optimizer acts on it, and knows which batches must not be used again.

Plain numbers in, plain decisions out. Every rank judges the same sums over all ranks, so all decide alike
without asking each other. What to do about a bad step is `train/recovery.py`'s business.

A withdrawn batch is left out of the count: step s uses the s-th batch that is not withdrawn. So the number of
updates stays the run's length in steps, and a batch that was thrown away leaves the same
run behind as one that never existed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from muster.config import schema
from muster.errors import TrainingError
from muster.resilience.spikes import Spikes

Kind = Literal["nan", "spike"]
Action = Literal["stop", "skip", "rewind"]
Span = tuple[int, int]
"""First and last of a stretch of batches."""

MOST_IN_A_ROW = 3
"""Bad steps in a row after which the next one stops the run."""
MOST_IN_ALL = 20
"""The same for all bad steps since the ranks were started."""


class BadStep(TrainingError):
    """A step that was not applied, raised on all ranks; nothing has changed but the gradients, which are dropped."""

    def __init__(self, message: str, kind: Kind) -> None:
        super().__init__(message)
        self.kind: Kind = kind


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a step."""

    kind: Kind
    said: str
    tolerated: bool
    """True where it is applied all the same, and only told."""


class Guard:
    def __init__(self, faults: schema.Faults) -> None:
        self._faults = faults
        self._spikes = Spikes()
        self._withdrawn: list[Span] = []
        self._in_a_row = self._in_all = 0
        self._rewound_at = -1

    def judge(self, loss: float, gradient_norm: float) -> Fault | None:
        """Judge a step by its loss and the norm of its gradients, both those of the global batch."""
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            return Fault("nan", f"loss {loss:.4g}, gradient norm {gradient_norm:.4g}: not finite", False)
        said = self._spikes.judge(loss, gradient_norm)
        return None if said is None else Fault("spike", said, self._faults.on_spike == "note")

    def applied(self, loss: float, gradient_norm: float) -> None:
        """Take in a step that was applied."""
        self._spikes.add(loss, gradient_norm)
        self._in_a_row = 0

    def act(self, step: int, kind: Kind) -> Action:
        """What to do about a bad step after `step` good ones.

        Under `rewind` the first of several in a row is skipped: the parameters have not seen it. Where the next batch
        is bad too, the parameters are to blame; where rewinding did not help, nothing will.
        """
        self._in_a_row += 1
        self._in_all += 1
        policy = self._faults.on_nan if kind == "nan" else self._faults.on_spike
        if policy == "stop" or self._in_a_row > MOST_IN_A_ROW or self._in_all > MOST_IN_ALL:
            return "stop"
        if policy != "rewind" or self._in_a_row != 2:
            return "skip"
        if step <= self._rewound_at:
            return "stop"
        self._rewound_at = step
        return "rewind"

    def checks_copies(self, step: int) -> bool:
        """Whether the copies of parameters are to be compared after `step` updates."""
        every = self._faults.checksum_every
        return every is not None and step % every == 0

    def batch_of(self, step: int) -> int:
        """The number of the batch that step `step` (from 0) uses."""
        batch = step
        for first, last in self._withdrawn:
            if first > batch:
                break
            batch += last - first + 1
        return batch

    def withdraw(self, first: int, last: int) -> None:
        """Never use the batches `first` to `last`, both included, (again)."""
        merged: list[Span] = []
        for span in sorted([*self._withdrawn, (first, last)]):
            if merged and span[0] <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], span[1]))
            else:
                merged.append(span)
        self._withdrawn = merged

    def state(self) -> dict[str, Any]:
        """What a checkpoint's manifest holds of it, as plain data."""
        return {"withdrawn": [list(span) for span in self._withdrawn], "recent": self._spikes.state()}

    def everything(self) -> dict[str, Any]:
        """The same, and the bad steps that were counted since the ranks were started."""
        return self.state() | {"counts": [self._in_a_row, self._in_all, self._rewound_at]}

    def restore(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Judge as when `state` was taken; what has been withdrawn since stays so. Older manifests hold nothing."""
        if "counts" in state:
            self._in_a_row, self._in_all, self._rewound_at = state["counts"]
        for first, last in state.get("withdrawn", []):
            self.withdraw(first, last)
        self._spikes.restore(state.get("recent", [[], []]))
