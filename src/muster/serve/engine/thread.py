"""The engine on a thread of this process: for `muster chat`, and for tests."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator, Callable

import torch

from muster.serve.crossing import WAITING_LIMIT, WAITING_S, WAITING_TOKENS, Inbox, Outcome, Streams
from muster.serve.engine.core import Core
from muster.serve.protocol import Request, Stats, Token

_LOG = logging.getLogger(__name__)


class ThreadEngine:
    """An `Engine` around a core. `threads` sets torch's threads for it; None leaves them."""

    def __init__(
        self,
        core: Core,
        *,
        waiting_limit: int = WAITING_LIMIT,
        waiting_tokens: int = WAITING_TOKENS,
        waiting_s: float = WAITING_S,
        threads: int | None = None,
    ) -> None:
        self._core = core
        self._threads = threads
        self._streams = Streams(waiting_limit, waiting_tokens, waiting_s)
        self._inbox = Inbox()
        self._stats = core.stats()
        self._thread = threading.Thread(target=self._run, name="muster-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> AsyncIterator[Token]:
        stream = self._streams.open(request)
        self._inbox.put(request)
        return stream

    def check(self) -> None:
        self._streams.check()

    def cancel(self, request_id: str) -> None:
        if self._streams.drop(request_id):
            self._inbox.put(request_id)

    def stats(self) -> Stats:
        return self._stats

    def close(self) -> None:
        self._streams.fail("the engine is stopping")
        self._inbox.close()
        self._thread.join()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            drive(self._core, self._inbox, self._deliver)
        except Exception as error:  # a fault of ours: nobody shall wait for tokens that never come
            _LOG.error("the engine has ended", exc_info=error)
            self._streams.fail(f"the engine has ended ({type(error).__name__}); the log has the details")

    def _deliver(self, outcome: Outcome) -> None:
        self._stats = outcome.stats
        self._streams.deliver(outcome.items, outcome.admitted)


def drive(core: Core, inbox: Inbox, deliver: Callable[[Outcome], None]) -> None:
    """Step a core as long as it has something to do, until the inbox is closed."""
    with torch.inference_mode():
        while (commands := inbox.take(wait=not core.busy)) is not None:
            for command in commands:
                if isinstance(command, Request):
                    core.add(command)
                elif isinstance(command, str):
                    core.cancel(command)
                else:
                    command()
            deliver(core.step())
    deliver(core.abandon())
