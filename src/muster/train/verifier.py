"""Verifies layouts one after the other against one process, on ranks forked for each, and finds the axis at fault."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from muster.config import schema
from muster.errors import TrainingError
from muster.model.spec import TransformerSpec
from muster.parallel.catalogue import AXES, world_of
from muster.resilience.forked import ForkedRanks
from muster.train.verify import (
    LEAST_SEQUENCES,
    Case,
    Difference,
    Record,
    case,
    compare,
    read_record,
    train_case,
)

Work = Callable[[Case, Path], None]
Degrees = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Verifier:
    run: schema.Run
    spec: TransformerSpec
    steps: int
    sequences: int = LEAST_SEQUENCES
    scratch: Path
    """An empty folder."""
    work: Work = train_case
    """What each rank does with a case."""
    timeout_s: float = 300.0
    _ranks: ForkedRanks = field(default_factory=ForkedRanks)

    @cached_property
    def reference(self) -> Record:
        """One process on its own."""
        return self._record({})

    def verify(self, layout: Degrees) -> Difference:
        """How far `layout` trains from one process; TrainingError where a rank fails."""
        return compare(self._record(layout), self.reference)

    def culprits(self, layout: Degrees) -> list[str]:
        """The axes of a layout that differ when they stand alone; none where only their composition does."""
        alone = {axis: {axis: layout[axis]} for axis in (*AXES, "expert") if layout.get(axis, 1) > 1}
        for axis, keys in _BELONGING.items():
            if axis in alone:
                alone[axis] |= {key: layout[key] for key in keys if key in layout}
        if "expert" in alone:
            alone["expert"] |= {"shard": layout["expert"]}
        return [axis for axis, degrees in alone.items() if len(alone) == 1 or not self._agrees(degrees)]

    def _agrees(self, layout: Degrees) -> bool:
        try:
            return self.verify(layout).ok
        except TrainingError:
            return False

    def _record(self, layout: Degrees) -> Record:
        made = case(self.run, self.spec, layout, self.steps, self.sequences)
        folder = self.scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        errors = self.scratch / "error.txt"
        self._ranks.run(world_of(layout), self.work, made, folder, errors=errors, timeout_s=self.timeout_s)
        return read_record(made, folder)


_BELONGING = {
    "shard": ("zero",),
    "tensor": ("sequence_parallel",),
    "context": ("context_kind",),
    "pipeline": ("schedule", "virtual", "split"),
}
"""Keys of the layout that say how an axis is used."""
