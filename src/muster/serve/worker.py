"""`python -m muster.serve.worker FD`: the engine's process, started by `engine/process.py`.

Its one connection is the socket FD. When that closes, the server has ended, and so does this at once. Where the model
is divided over several ranks, it is the first of them; the others are `run_rank`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from muster.errors import MusterError
from muster.parallel.world import join
from muster.serve.crossing import Inbox
from muster.serve.engine.batch import Network
from muster.serve.engine.core import Outcome
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed_file import source_digest
from muster.serve.engine.part import Part
from muster.serve.engine.ranks import (
    STEP_S,
    Grid,
    Load,
    Orders,
    ParallelNetwork,
    follow,
    load_if_there,
    load_together,
)
from muster.serve.engine.thread import drive
from muster.serve.engine.transfer import Porter
from muster.serve.engine.wire import Wire, from_outcome, to_request
from muster.serve.folders import find_source
from muster.serve.follow import Follower
from muster.serve.kernels.packing import LAYOUT
from muster.serve.opening import BLOCK_TOKENS, Setup, core_of, count_blocks
from muster.serve.weights import load_network, read_spec

if TYPE_CHECKING:
    from muster.resilience.budget import Failure
    from muster.serve.engine.others import Others

_LOG = logging.getLogger(__name__)
_KINDS = {2: "UsageError", 3: "DoesNotFit"}


def main(fd: int) -> None:
    # Whoever stops the server stops it alone: requests under way are finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wire = Wire(socket.socket(fileno=fd))
    messages = wire.messages()
    setup = Setup(**next(messages)["setup"])
    inbox, end = Inbox(), _End(wire)
    # From now on, as loading may take long, too.
    threading.Thread(target=_listen, args=(messages, inbox, end), daemon=True).start()
    torch.set_num_threads(setup.threads)
    with ExitStack() as stack:
        try:
            _serve(setup, inbox, end, stack)
        except Exception as error:
            end.by(error)


def _serve(setup: Setup, inbox: Inbox, end: _End, stack: ExitStack) -> None:
    orders: Orders | None = None
    if setup.ranks > 1:
        from muster.serve.engine.others import Others  # what it imports is of use to several ranks only

        end.others = Others(json.dumps(asdict(setup)), setup.ranks, setup.threads, end.by_failure)
        stack.enter_context(join(STEP_S, on_cpu=True))
        grid, orders, load = _place(setup)
    else:
        load = _load(setup)
    setup, own = _loaded(setup, load, orders)
    cache = own.new_cache(setup.blocks or count_blocks(own.part.whole, setup), BLOCK_TOKENS)
    parallel: ParallelNetwork | None = None
    network: Network = own
    if orders is not None:
        network = parallel = ParallelNetwork(own, grid, orders)
    core = core_of(setup, network, cache)
    end.wire.send({"ready": True, "stats": core.stats()})
    end.ready = True
    if setup.ranks == 1:
        end.porter = Porter(core, cache, f"{source_digest(Path(setup.folder))} {setup.dtype} {LAYOUT}")
    if setup.follow is not None:
        Follower(Path(setup.follow), setup.step, core, inbox, load, parallel)

    def deliver(outcome: Outcome) -> None:
        try:
            end.wire.send(from_outcome(outcome))
        except OSError:
            end.leave(0)

    drive(core, inbox, deliver)


def run_rank(told: str) -> None:
    """A rank other than the first: follows until the first one ends. `told` is the setup that it has been given."""
    setup = Setup(**json.loads(told))
    with join(STEP_S, on_cpu=True):
        grid, orders, load = _place(setup)
        own: TransformerNetwork | None = None
        while own is None:
            own = load_together(orders, load, may_go=setup.follow is not None)
        follow(own, own.new_cache(setup.blocks, BLOCK_TOKENS), grid, orders, load)


def _place(setup: Setup) -> tuple[Grid, Orders, Load]:
    """This rank among the others, once they have joined."""
    grid, orders = Grid(setup.tensor, setup.pipeline), Orders()
    return grid, orders, _load(setup, grid)


def _load(setup: Setup, grid: Grid | None = None) -> Load:
    if grid is None:
        return lambda folder: load_network(Path(folder), setup.dtype)
    place = grid

    def load(folder: str) -> TransformerNetwork:
        spec = read_spec(Path(folder))
        part = Part.of(spec, place.rank, tensor=setup.tensor, pipeline=setup.pipeline)
        return load_network(Path(folder), setup.dtype, part, place.total)

    return load


def _loaded(setup: Setup, load: Load, orders: Orders | None) -> tuple[Setup, TransformerNetwork]:
    """What is served in the end, and this rank's part of it.

    That is the newest checkpoint where the one that the server began with is deleted by the training it follows.
    """
    while True:
        folder, may_go = setup.folder, setup.follow is not None
        if orders is None:
            network = load_if_there(load, folder, may_go=may_go)
        else:
            network = load_together(orders, load, folder, may_go=may_go)
        if network is not None:
            return setup, network
        source = find_source(Path(setup.follow or folder))
        setup = replace(setup, folder=str(source.weights), tokenizer=str(source.tokenizer), step=source.step)


class _End:
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


def _listen(messages: Iterator[dict[str, Any]], inbox: Inbox, end: _End) -> None:
    for message in messages:
        if "move" in message:
            inbox.put(partial(end.move, *message["move"]))
            continue
        inbox.put(to_request(message["add"]) if "add" in message else message["cancel"])
    end.leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
