"""`python -m muster.serve.worker FD`: the engine's process, started by `engine/process.py`.

Its one connection is the socket FD, over which it is told what to make. When that closes, the server has ended, and so
does this at once. Imports no torch at the top: while torch is being imported, packed weights are read already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from muster.errors import MusterError
from muster.serve.crossing import Inbox
from muster.serve.engine.packed_bytes import ReadAhead
from muster.serve.engine.wire import Wire, to_request

if TYPE_CHECKING:
    from muster.resilience.budget import Failure
    from muster.serve.engine.others import Others
    from muster.serve.engine.transfer import Porter

_LOG = logging.getLogger(__name__)
_KINDS = {2: "UsageError", 3: "DoesNotFit"}

Told = tuple[dict[str, Any], ReadAhead]
"""The setup, and its packed weights on their way."""


def main(fd: int) -> None:
    # Whoever stops the server stops it alone: requests under way are finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wire = Wire(socket.socket(fileno=fd))
    inbox, end, told = Inbox(), End(wire), Future[Told]()
    # From now on, as importing and loading take long, too.
    threading.Thread(target=_listen, args=(wire.messages(), inbox, end, told), daemon=True).start()
    with ExitStack() as stack:
        try:
            from muster.serve.making import serve

            serve(*told.result(), inbox, end, stack)
        except Exception as error:
            end.by(error)


class End:
    """How the process ends, and what the server hears of it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.others: Others | None = None
        self.ready = False
        """Whether the server has been told that this can generate."""
        self.porter: Porter | None = None

    def move(self, number: int, path: str, prompt: list[int]) -> None:
        """Between two steps: move blocks, and say how many that were."""
        blocks = self.porter.move(Path(path), prompt) if self.porter is not None else 0
        with contextlib.suppress(OSError):  # the server has gone before
            self.wire.send({"moved": [number, blocks]})

    def by(self, error: Exception) -> NoReturn:
        """Something went wrong here; where that comes of another rank's end, that is said instead."""
        if self.others is not None:
            self.others.explain()
        known = isinstance(error, MusterError)
        if not known:
            _LOG.error("the engine has ended", exc_info=error)
        self._say(
            str(error) if known else f"the engine failed ({type(error).__name__})", type(error).__name__
        )
        self.leave(1)

    def by_failure(self, failure: Failure) -> NoReturn:
        """Another rank has ended."""
        self._say(failure.sentence, _KINDS.get(failure.exit_code, "MusterError"))
        self.leave(1)

    def leave(self, code: int) -> NoReturn:
        """At once, and all ranks with it."""
        if self.others is not None:
            self.others.close(keep_logs=code != 0)
        os._exit(code)

    def _say(self, sentence: str, kind: str) -> None:
        message = {"failed": sentence} if self.ready else {"error": sentence, "kind": kind}
        try:
            self.wire.send(message)
        except OSError:
            _LOG.debug("the server has gone before")


def _listen(messages: Iterator[dict[str, Any]], inbox: Inbox, end: End, told: Future[Told]) -> None:
    ahead: ReadAhead | None = None
    for message in messages:
        if "ahead" in message:
            ahead = ReadAhead(Path(message["ahead"]), message["format"])
        elif "setup" in message:
            setup = message["setup"]
            told.set_result((setup, ahead or ReadAhead(Path(setup["folder"]), setup["dtype"])))
        elif "move" in message:
            inbox.put(partial(end.move, *message["move"]))
        else:
            inbox.put(to_request(message["add"]) if "add" in message else message["cancel"])
    end.leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
