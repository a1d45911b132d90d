"""Long prompts are computed by replicas of their own, so that streams which run elsewhere do not wait for them.

Before a replica gets the request, one for prompts computes it and leaves its blocks in a file, which the other takes
up (`serve/handover.py`). It then finds the prompt in its prefix cache and computes the end of it. Whatever goes wrong
on this way only makes it compute all of it: the answers are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from muster.serve.handover import FILE, SECRET, TAKE, Handover
from muster.serve.router.asked import Asked
from muster.serve.router.policy import PROMPT_SHARE
from muster.serve.router.upstream import Gone, Headers

if TYPE_CHECKING:
    from muster.serve.router.fleet import Fleet, Replica
    from muster.serve.router.forward import Incoming

_LOG = logging.getLogger(__name__)

LEAST_TOKENS = 128
"""Of a prompt, as far as the router can tell: shorter ones fit into a step beside the others' tokens."""
KNOWN_SHARE = 0.5
"""Of a prompt that its replica knows already: then the rest is computed there."""
LIMIT_S = 30.0
_MEMORY = Path("/dev/shm")


class Carrier:
    """Has prompts computed, and carries their blocks. Its files are gone with it."""

    def __init__(self) -> None:
        parent = _MEMORY if _MEMORY.is_dir() else None
        folder = Path(tempfile.mkdtemp(prefix="muster-blocks-", dir=parent))  # only this user may enter
        self.handover = Handover(secrets.token_hex(32), folder)
        self.close = weakref.finalize(self, shutil.rmtree, folder, True)
        self.carried = self.failed = 0

    async def carry(self, fleet: Fleet, incoming: Incoming, to: Replica) -> None:
        """Bring a prompt's blocks to the replica that gets the request. Never fails."""
        asked = incoming.asked
        source = fleet.least_loaded_for_prompts(avoided=to.index)
        if source is None or to.upstream is None:
            return
        try:
            with self._file() as path:
                sent: Headers = [
                    *incoming.headers,
                    (SECRET.encode(), self.handover.secret.encode()),
                    (FILE.encode(), path.name.encode()),
                ]
                async with asyncio.timeout(LIMIT_S):
                    with fleet.attempt(source, asked, asked.output_tokens) as attempt:
                        exchange = await attempt.upstream.send(
                            incoming.method, incoming.target, sent, asked.with_fields()
                        )
                        try:
                            given = _blocks(exchange.status, await exchange.whole())
                        finally:
                            exchange.close()
                        attempt.succeeded()
                    exchange = await to.upstream.send("POST", TAKE, sent, b"{}")
                    try:
                        taken = _blocks(exchange.status, await exchange.whole())
                    finally:
                        exchange.close()
            self.carried += bool(taken)
            self.failed += taken < given
        except (Gone, OSError, TimeoutError, ValueError) as error:
            self.failed += 1
            _LOG.warning("a prompt is computed where it is answered: %s", error)

    @contextlib.contextmanager
    def _file(self) -> Iterator[Path]:
        path = self.handover.folder / secrets.token_hex(16)
        path.touch(mode=0o600, exist_ok=False)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def is_worth_it(asked: Asked, known_share: float) -> bool:
    """Whether a request's prompt should be computed elsewhere."""
    long_enough = asked.prompt_cost >= PROMPT_SHARE * LEAST_TOKENS
    return asked.generates and long_enough and known_share < KNOWN_SHARE


def _blocks(status: int, content: bytes) -> int:
    if status != 200:
        raise ValueError(f"a replica answered with status {status}")
    return int(orjson.loads(content)["blocks"])
