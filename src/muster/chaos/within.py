"""A rank's end of `muster chaos`, for what cannot be done from outside: its links go through the drill's switchboard,
and a gradient turns bad when the drill says so. `muster train` calls this where the drill has left its environment.
"""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from muster.resilience.between import COORDINATOR, GROUP, STORE

LINES, ORDERS = "MUSTER_CHAOS_LINES", "MUSTER_CHAOS_ORDERS"
"""The switchboard's socket, and the folder in which the drill leaves orders for ranks."""


def enter(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make this process a rank of a drill, before it connects to anything."""
    if (lines := environment.get(LINES)) is not None:
        reroute(environment, lines)
    if (orders := environment.get(ORDERS)) is not None:
        await_poison(Path(orders), rank_of(environment))


def rank_of(environment: Mapping[str, str]) -> int:
    """Among all ranks of the run, those of the groups before this one's included."""
    return int(environment.get(GROUP, 0)) * int(environment["WORLD_SIZE"]) + int(environment["RANK"])


def reroute(environment: MutableMapping[str, str], lines: str) -> None:
    """Have each place that this rank connects to reached by a line of its own."""
    who = f"rank {rank_of(environment)}"
    store = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    environment["MASTER_ADDR"], environment["MASTER_PORT"] = (
        "127.0.0.1",
        str(_line(lines, who, "store", *store)),
    )
    for name, what in ((COORDINATOR, "membership"), (STORE, "groups' store")):
        if name in environment:
            host, port = environment[name].rsplit(":", 1)
            environment[name] = f"127.0.0.1:{_line(lines, who, what, host, int(port))}"


def _line(lines: str, who: str, what: str, host: str, port: int) -> int:
    with socket.socket(socket.AF_UNIX) as board:
        board.connect(lines)
        board.sendall(json.dumps({"who": who, "what": what, "host": host, "port": port}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(board.makefile("rb").readline())
    return int(answer["port"])


def order_poison(orders: Path, rank: int, seed: int) -> None:
    """Have one gradient of `rank` turn bad in its next step."""
    draft = orders / f"poison-{rank}.draft"
    draft.write_text(str(seed))
    draft.rename(orders / f"poison-{rank}")


def await_poison(orders: Path, rank: int) -> None:
    """From now on, look at each step for an order, just before the gradients are measured."""
    from muster.train import gradients

    order = orders / f"poison-{rank}"
    honest = gradients.squared_norm

    def squared_norm(named: gradients.Named, copies_apart: int = 1) -> float:
        try:
            seed = int(order.read_text())
        except OSError:
            return honest(named, copies_apart)
        order.unlink()
        spoil(named, random.Random(seed))
        return honest(named, copies_apart)

    gradients.squared_norm = squared_norm


def spoil(named: Sequence[tuple[str, Any]], chance: random.Random, name: str | None = None) -> str:
    """A nan or inf in one element of this rank's part of one gradient, that of `name` if given; the one's name."""
    parts = {each: _local(parameter.grad) for each, parameter in named if parameter.grad is not None}
    name = name or chance.choice(sorted(each for each, part in parts.items() if part.numel()))
    flat = parts[name].view(-1)
    flat[chance.randrange(len(flat))] = chance.choice([float("nan"), float("inf"), -float("inf")])
    return name


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
