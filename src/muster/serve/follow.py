"""Newer checkpoints of a running training are taken up between two steps, while requests go on.

A thread looks for them, checks every byte and loads the weights beside those that serve; then the engine changes
over, and the old ones go. A request that is under way keeps the tokens it has and goes on with the new weights, as if
they had been given those tokens: its keys and values are computed again, and the prefix cache begins anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from muster.checkpoint import manifest, shelf
from muster.errors import CheckpointError
from muster.serve.crossing import Inbox
from muster.serve.engine.core import Core
from muster.serve.engine.ranks import Load, ParallelNetwork
from muster.serve.opening import salt_of

_LOG = logging.getLogger(__name__)
_POLL_S = 0.5


class Follower:
    """Watches the checkpoints of a run for a core that serves the one of `step`; `parallel` where it is on ranks."""

    def __init__(
        self,
        run: Path,
        step: int,
        core: Core,
        inbox: Inbox,
        load: Load,
        parallel: ParallelNetwork | None = None,
    ) -> None:
        self._shelf, self._step = run / "checkpoints", step
        self._core, self._inbox, self._load, self._parallel = core, inbox, load, parallel
        threading.Thread(target=self._run, name="muster-follower", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_POLL_S)
            newest = max(shelf.steps(self._shelf), default=0)
            if newest <= self._step:
                continue
            self._step = newest
            try:
                self._take_up(newest)
            except (
                Exception
            ) as error:  # damaged, or deleted meanwhile: what serves goes on, and the next one may do
                _LOG.error("the checkpoint of step %d is not served (%s)", newest, error)

    def _take_up(self, step: int) -> None:
        folder = shelf.folder_of(self._shelf, step)
        manifest.verify(folder)
        parallel = self._parallel
        if parallel is None:
            network = self._load(str(folder))
            self._between_steps(lambda: self._core.renew(network, salt=salt_of(step), weights_step=step))
            return
        self._between_steps(lambda: parallel.load(str(folder)))
        try:
            own = self._load(str(folder))
        except Exception:
            self._between_steps(lambda: parallel.renew(None))
            raise
        taken = threading.Event()

        def change() -> None:
            if parallel.renew(own):
                self._core.renew(parallel, salt=salt_of(step), weights_step=step)
                taken.set()

        self._between_steps(change)
        if not taken.is_set():
            raise CheckpointError("another rank could not load it")

    def _between_steps(self, what: Callable[[], object]) -> None:
        """Have the engine's thread do it, and wait until it has."""
        done = threading.Event()

        def do() -> None:
            what()
            done.set()

        self._inbox.put(do)
        done.wait()
