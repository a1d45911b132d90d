"""The agent's side of a node's memory: the folder on tmpfs, which outlives ranks and goes with its agent.

The folder is locked while its agent lives, however that ends; whoever makes the next one on this machine removes those
that nobody holds any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from muster.checkpoint.memory import Held
from muster.checkpoint.peers import ENVIRONMENT, Address, Server

TMPFS = Path("/dev/shm")
PREFIX = "muster-memory-"
_DRAFT = ".draft"
_DRAFT_S = 60.0
"""A folder that is not locked and has its final name within a minute is never going to."""


class Keeper:
    """Use: `claim`, then `serve` where there are other nodes, `environment` for each set of ranks, `close`."""

    def __init__(self, digest: str, base: Path = TMPFS) -> None:
        """`digest` is the run's, by which the nodes of a job know one another."""
        self._digest, self._base = digest, base
        self._held: Held | None = None
        self._server: Server | None = None
        self._served: Address | None = None

    def claim(self) -> None:
        """Make the folder, and remove what dead agents left. Nothing happens on a machine without tmpfs."""
        if not os.access(self._base, os.W_OK):
            return
        for left in sorted(self._base.glob(f"{PREFIX}*")):
            if _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{self._digest[:12]}-", suffix=_DRAFT, dir=self._base))
        self._lock = os.open(draft, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._held = Held(draft.rename(draft.with_suffix("")))

    def serve(self, host: str) -> Address | None:
        """Where the other nodes reach this one's memory, by the name or address `host`; None where they cannot."""
        if self._held is None:
            return None
        if self._served is None or self._served[0] != host:
            self._stop()
            with suppress(OSError):
                self._server = Server(self._held, host, self._digest)
                self._served = host, self._server.port
        return self._served

    def environment(self, attempt: int, others: Sequence[Address]) -> dict[str, str]:
        """What the ranks of an attempt need to know; `others` follow this node in the ring."""
        if self._held is None:
            return {}
        told: dict[str, Any] = {
            "root": str(self._held.root),
            "attempt": attempt,
            "others": others,
            "token": self._digest,
        }
        return {ENVIRONMENT: json.dumps(told)}

    def newest(self) -> int:
        """Step of the newest generation here; 0 without one."""
        held = self._held.generations() if self._held is not None else {}
        return max((generation.step for generation in held), default=0)

    def close(self) -> None:
        """Remove everything."""
        self._stop()
        if self._held is None:
            return
        # Under another name first, so that whoever still writes there finds no place any more.
        gone = self._held.root.rename(self._held.root.with_suffix(_DRAFT))
        shutil.rmtree(gone, ignore_errors=True)
        os.close(self._lock)
        self._held = None

    def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = self._served = None


def _is_abandoned(folder: Path) -> bool:
    try:
        if folder.suffix == _DRAFT and time.time() - folder.stat().st_mtime < _DRAFT_S:
            return False
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # somebody else's, or no folder of ours
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
