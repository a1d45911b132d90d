from __future__ import annotations

import gc
import linecache
import sys
from typing import Any

import torch.distributed.tensor._dispatch as dispatch


def imported_here() -> tuple[set[str], bool]:
    """Modules that this process has imported itself, and whether it would have to read torch's sources."""
    # What was there before the fork is frozen, and not among these.
    own = {id(thing) for thing in gc.get_objects()}
    names = {name for name, module in sys.modules.items() if id(module) in own}
    return names, dispatch.__file__ not in linecache.cache


def test_ranks_are_forked_with_what_each_would_import_and_read(run_ranks: Any) -> None:
    """A forkserver passes over what it cannot import, and every rank would then do it, unseen."""
    for imported, reads in run_ranks(2, imported_here):
        assert __name__ in imported
        assert not imported & {"pytest", "tests.conftest", "muster.train.entry", "torch._dynamo"}
        assert not reads
