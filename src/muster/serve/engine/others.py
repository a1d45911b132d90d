"""The ranks beside the first, which is the engine's process: forked, watched and ended as those of training are.

When one of them ends by itself, so does the engine, with a sentence that names the rank and has its last words.
"""

from __future__ import annotations

import os
import select
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from muster.errors import TrainingError
from muster.resilience.budget import Failure
from muster.resilience.ranks import Place, Ranks, Zygote

RANK_SETUP = "MUSTER_SERVE_RANK"
"""In the environment of a rank that `muster serve` is: what it serves, as JSON."""

_CAUSE_WAIT_S = 1.0
"""How long a rank that only lost its peer waits for the peer to be seen dead."""
_SEEN_S = 5.0
_POLL_S = 0.05


class Others:
    """Ranks 1 to `world` - 1 of an engine; the environment of this process becomes that of rank 0.

    `setup` is what they serve, as JSON. `on_failure` is called once, on a thread, when one of them has ended.
    """

    def __init__(self, setup: str, world: int, threads: int, on_failure: Callable[[Failure], None]) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._logs = Path(tempfile.mkdtemp(prefix="muster-serve-"))
        self._on_failure = on_failure
        self._failed = threading.Event()
        self._closing = False
        self._zygote = Zygote(["muster.serve.making", "muster.serve.engine.ranks", "muster.cli.serve"])
        place = Place(first=1, ranks=world - 1, world=world, host="127.0.0.1", port=self._store.port)
        told = {RANK_SETUP: setup, "OMP_NUM_THREADS": str(threads), "LOCAL_WORLD_SIZE": str(world)}
        self._ranks = Ranks(
            zygote=self._zygote,
            argv=["serve", "."],
            place=place,
            logs=self._logs,
            environment={local: told | {"LOCAL_RANK": str(local + 1)} for local in range(world - 1)},
        )
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": place.host,
            "MASTER_PORT": str(place.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": str(threads),
        }
        threading.Thread(target=self._watch, name="muster-ranks", daemon=True).start()

    def explain(self) -> None:
        """Called when this rank has lost the others. Returns only if none of them is seen to have ended."""
        if self._failed.wait(_SEEN_S):
            threading.Event().wait()  # the watching thread ends this process

    def close(self, *, keep_logs: bool = False) -> None:
        """End them all."""
        self._closing = True
        self._zygote.close()  # and the kernel ends what it has forked
        self._ranks.close()
        if not keep_logs:
            shutil.rmtree(self._logs, ignore_errors=True)

    def _watch(self) -> None:
        failed_at: float | None = None
        while True:
            try:
                select.select([self._zygote.fileno()], [], [], None if failed_at is None else _POLL_S)
                self._zygote.read(wait=False)
            except (TrainingError, OSError, ValueError) as error:  # it is gone, or closed from here
                failure: Failure | None = Failure(sentence=str(error), node="")
            else:
                failure = self._ranks.failure()
            if failure is None and self._ranks.over:
                failure = Failure(sentence="the other ranks have ended", node="")
            if failure is None:
                continue
            failed_at = failed_at or time.monotonic()
            if failure.consequence and time.monotonic() < failed_at + _CAUSE_WAIT_S:
                continue
            if self._closing:
                return
            self._failed.set()
            self._on_failure(self._with_last_words(failure))
            return

    def _with_last_words(self, failure: Failure) -> Failure:
        """Its sentence in one line, with what the rank wrote last."""
        lines = [line.strip() for line in failure.sentence.splitlines() if line.strip()]
        sentence = lines[0] if len(lines) == 1 else f"{lines[0].split(':')[0]}: {lines[-1]}"
        if failure.signal and failure.rank is not None:
            log = self._logs / f"rank-{failure.rank:05d}.log"
            said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            if said and not said[-1].startswith("--- attempt"):
                sentence += f"; its last words: {said[-1][-500:]}"
        return replace(failure, sentence=sentence)
