"""From a setup to an engine that steps, in a process of its own: alone, or as the first of several ranks."""

from __future__ import annotations

import gc
import json
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from muster.errors import UsageError
from muster.serve.crossing import Inbox, Outcome
from muster.serve.engine.batch import Network
from muster.serve.engine.cores import this_core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.part import Part
from muster.serve.engine.thread import drive
from muster.serve.engine.transfer import Porter
from muster.serve.engine.wire import from_outcome
from muster.serve.folders import find_source, read_spec
from muster.serve.kernels.ops import choose_kernels
from muster.serve.kernels.packing import LAYOUT
from muster.serve.opening import BLOCK_TOKENS, Setup, core_of, with_blocks
from muster.serve.weights import choose_device, compute_dtype, digest_of, load_if_there, load_network

if TYPE_CHECKING:
    from muster.serve.engine.packed_bytes import ReadAhead
    from muster.serve.engine.ranks import Grid, Load, Orders, ParallelNetwork
    from muster.serve.worker import End
# What serves several ranks, or follows a training, is imported where it is needed: it would take a tenth of a start.


def serve(told: dict[str, Any], ahead: ReadAhead, inbox: Inbox, end: End, stack: ExitStack) -> None:
    """Make what the setup `told` says and step it until the inbox is closed."""
    setup = with_blocks(Setup(**told))
    torch.set_num_threads(setup.threads)
    device = choose_device(setup.ranks)
    orders: Orders | None = None
    if setup.ranks > 1:
        from muster.parallel.world import join
        from muster.serve.engine.others import Others
        from muster.serve.engine.ranks import STEP_S

        end.others = Others(json.dumps(asdict(setup)), setup.ranks, setup.threads, end.by_failure)
        stack.enter_context(join(STEP_S, on_cpu=True))
        grid, orders, load = _place(setup)
    else:

        def load(folder: str) -> TransformerNetwork:
            return load_network(Path(folder), setup.dtype, read=ahead, device=device, adapters=setup.adapters)

    setup, own = _loaded(setup, load, orders)
    cache = own.new_cache(setup.blocks, BLOCK_TOKENS, setup.kv)
    parallel: ParallelNetwork | None = None
    network: Network = own
    if orders is not None:
        from muster.serve.engine.ranks import ParallelNetwork

        network = parallel = ParallelNetwork(own, grid, orders)
    core = core_of(setup, network, cache)
    kernels = choose_kernels(compute_dtype(setup.dtype), device)[1]
    end.wire.send({"ready": True, "stats": core.stats(), "kernels": kernels})
    end.ready = True
    if setup.ranks == 1:
        with suppress(UsageError, OSError):  # a checkpoint that the training it follows has deleted meanwhile
            end.porter = Porter(core, cache, f"{digest_of(Path(setup.folder))} {setup.dtype} {LAYOUT}")
    if setup.follow is not None:
        from muster.serve.follow import Follower

        Follower(Path(setup.follow), setup.step, core, inbox, load, parallel)

    def deliver(outcome: Outcome) -> None:
        try:
            end.wire.send(from_outcome(outcome) | {"core": this_core()})
        except OSError:
            end.leave(0)

    gc.freeze()  # what is there now stays: looking through all of torch now and then would delay a step
    drive(core, inbox, deliver)


def run_rank(told: str) -> None:
    """A rank other than the first: follows until the first one ends. `told` is the setup that it has been given."""
    from muster.parallel.world import join
    from muster.serve.engine.ranks import STEP_S, follow, load_together

    setup = Setup(**json.loads(told))
    with join(STEP_S, on_cpu=True):
        grid, orders, load = _place(setup)
        own: TransformerNetwork | None = None
        while own is None:
            own = load_together(orders, load, may_go=setup.follow is not None)
        follow(own, own.new_cache(setup.blocks, BLOCK_TOKENS, setup.kv), grid, orders, load)


def _place(setup: Setup) -> tuple[Grid, Orders, Load]:
    """This rank among the others, once they have joined."""
    from muster.serve.engine.ranks import Grid, Orders

    grid, orders = Grid(setup.tensor, setup.pipeline), Orders()

    def load(folder: str) -> TransformerNetwork:
        spec = read_spec(Path(folder))
        part = Part.of(spec, grid.rank, tensor=setup.tensor, pipeline=setup.pipeline)
        return load_network(Path(folder), setup.dtype, part, grid.total, adapters=setup.adapters)

    return grid, orders, load


def _loaded(setup: Setup, load: Load, orders: Orders | None) -> tuple[Setup, TransformerNetwork]:
    """What is served in the end, and this rank's part of it.

    That is the newest checkpoint where the one that the server began with is deleted by the training it follows.
    """
    while True:
        folder, may_go = setup.folder, setup.follow is not None
        if orders is None:
            network = load_if_there(load, folder, may_go=may_go)
        else:
            from muster.serve.engine.ranks import load_together

            network = load_together(orders, load, folder, may_go=may_go)
        if network is not None:
            return setup, network
        source = find_source(Path(setup.follow or folder))
        setup = replace(setup, folder=str(source.weights), tokenizer=str(source.tokenizer), step=source.step)
