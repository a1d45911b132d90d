"""The proxy: what arrives is what was sent, in order, in whatever weather; and gloo's ranks reach each other by it."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from muster.chaos import within
from muster.chaos.links import FAIR, Line, Switchboard, Weather


@pytest.fixture
def board() -> Iterator[Switchboard]:
    with Switchboard() as board:
        yield board


@pytest.fixture
def ends(board: Switchboard) -> Iterator[tuple[Line, socket.socket, socket.socket]]:
    """A line, and the two ends of a connection by it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = board.line(("127.0.0.1", server.getsockname()[1]), who="test", what="server")
        with socket.create_connection(("127.0.0.1", line.port), timeout=20) as near:
            far, _ = server.accept()
            far.settimeout(20)
            with far:
                yield line, near, far


def read(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count and (chunk := connection.recv(count - len(content))):
        content += chunk
    return content


@pytest.mark.parametrize(
    "weather",
    [FAIR, Weather(latency_s=0.005, jitter_s=0.02), Weather(bytes_per_s=20e6)],
    ids=["fair", "jitter", "narrow"],
)
def test_every_byte_arrives_in_order(
    weather: Weather, board: Switchboard, ends: tuple[Line, socket.socket, socket.socket]
) -> None:
    line, near, far = ends
    board.set(line, weather)
    content = random.Random(0).randbytes(1_500_000)
    for sender, receiver in ((near, far), (far, near)):
        thread = threading.Thread(target=sender.sendall, args=(content,))
        thread.start()
        assert read(receiver, len(content)) == content
        thread.join()
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b"", "the end of one direction is passed on"
    far.sendall(b"still")
    assert read(near, 5) == b"still"


def test_latency_holds_back_and_a_stall_holds_until_it_is_over(
    board: Switchboard, ends: tuple[Line, socket.socket, socket.socket]
) -> None:
    line, near, far = ends
    board.set(line, Weather(latency_s=0.2))
    begun = time.monotonic()
    near.sendall(b"late")
    assert read(far, 4) == b"late"
    assert time.monotonic() - begun >= 0.2
    board.set(line, Weather(stalled=True))
    near.sendall(b"stalled")
    assert not select.select([far], [], [], 0.3)[0]
    board.set(line, FAIR)
    assert read(far, 7) == b"stalled"


def test_a_reset_is_one_at_both_ends(
    board: Switchboard, ends: tuple[Line, socket.socket, socket.socket]
) -> None:
    line, near, far = ends
    near.sendall(b"x")
    assert far.recv(1) == b"x"
    board.reset(line)
    for end in (near, far):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    until_s = time.monotonic() + 20
    with socket.create_connection(("127.0.0.1", line.port)):
        while line.connections < 2:
            assert time.monotonic() < until_s, "who comes again is let in"
            time.sleep(0.01)


def test_who_comes_while_it_closes_is_not_left_open() -> None:
    for _ in range(20):  # what is left open is a warning where it is collected, and warnings are errors
        with Switchboard() as board, socket.create_server(("127.0.0.1", 0)) as server:
            line = board.line(("127.0.0.1", server.getsockname()[1]), who="test", what="server")
            with socket.create_connection(("127.0.0.1", line.port)):
                pass
    gc.collect()


def sums_by_lines(lines: str, port: int) -> tuple[list[float], bool]:
    """What a rank sums with the others, by lines of the switchboard."""
    import torch
    import torch.distributed as dist

    from muster.parallel.world import join

    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    within.reroute(os.environ, lines)
    with join() as world:
        own = torch.randn(1000, generator=torch.Generator().manual_seed(world.rank))
        whole = [torch.empty_like(own) for _ in range(world.size)]
        dist.all_gather(whole, own)
        expected = sum(
            torch.randn(1000, generator=torch.Generator().manual_seed(r)) for r in range(world.size)
        )
        group = dist.new_group(list(range(world.size)))
        dist.all_reduce(own, group=group)
        return own.tolist(), bool(torch.allclose(sum(whole), expected))  # type: ignore[arg-type]


def test_gloo_s_ranks_talk_to_each_other_by_lines(board: Switchboard, run_ranks: Any) -> None:
    peers: list[Line] = []
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(0.005):
            with contextlib.suppress(RuntimeError):  # the list changed
                peers.extend(line for line in board.lines if line.what == "peers" and line not in peers)

    thread = threading.Thread(target=watch)
    thread.start()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = run_ranks(3, sums_by_lines, board.address, store.port)
    watching.set()
    thread.join()
    assert all(right and sums == results[0][0] for sums, right in results)
    stores = [line for line in board.lines if line.what == "store"]
    assert sorted(line.who for line in stores) == ["rank 0", "rank 1", "rank 2"]
    # Three pairs in each of two groups, and all that they said went by the proxy.
    assert len(peers) >= 6
    assert sum(line.carried_bytes for line in peers) > 3 * 2 * 4000
