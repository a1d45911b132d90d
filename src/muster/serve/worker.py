"""`python -m muster.serve.worker FD`: the engine's process, started by `engine/process.py`.

Its one connection is the socket FD. When that closes, the server has ended, and so does this at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from muster.errors import MusterError
from muster.serve.crossing import Inbox
from muster.serve.engine.core import Outcome
from muster.serve.engine.thread import drive
from muster.serve.engine.wire import Wire, from_outcome, to_request
from muster.serve.opening import Setup, build_core


def main(fd: int) -> None:
    # Whoever stops the server stops it alone: requests under way are finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wire = Wire(socket.socket(fileno=fd))
    messages = wire.messages()
    setup = Setup(**next(messages)["setup"])
    inbox = Inbox()
    # From now on, as loading may take long, too.
    threading.Thread(target=_listen, args=(messages, inbox), daemon=True).start()
    torch.set_num_threads(setup.threads)
    try:
        core = build_core(setup)
    except MusterError as error:
        wire.send({"error": str(error), "kind": type(error).__name__})
        return
    wire.send({"ready": True})

    def deliver(outcome: Outcome) -> None:
        try:
            wire.send(from_outcome(outcome))
        except OSError:
            os._exit(0)

    drive(core, inbox, deliver)


def _listen(messages: Iterator[dict[str, Any]], inbox: Inbox) -> None:
    for message in messages:
        inbox.put(to_request(message["add"]) if "add" in message else message["cancel"])
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
