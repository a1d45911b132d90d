"""What ranks find in memory after their death: the newest whole generation, each file sound or its neighbour's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from muster.checkpoint.memory import Held
from muster.checkpoint.peers import ENVIRONMENT, Server
from muster.observe.records import read_jsonl
from tests.toy import STEPS, tiny, train_here, write_corpus

LAYOUT = {"shard": 2, "zero": 3}
NEVER = "1000000 steps"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def straight(corpus: Path, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the run that nobody touches."""
    folder = tmp_path_factory.mktemp("straight")
    run_ranks(2, train_here, a_run(), str(corpus), str(folder))
    return losses(folder)


def a_run(every: str = NEVER) -> dict[str, Any]:
    return tiny(layout=LAYOUT, checkpoint={"every": every, "memory": "2 steps"})


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_jsonl(folder / "events.jsonl") if event["event"] == kind]


def losses(folder: Path) -> list[float]:
    found = {
        record["step"]: record["loss"] for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record
    }
    assert sorted(found) == list(range(1, STEPS + 1))
    return [found[step] for step in sorted(found)]


@contextmanager
def nodes(base: Path, count: int) -> Iterator[list[dict[str, Any]]]:
    """The memory of so many nodes with one rank each, as each rank is told of it."""
    held = [Held(base / str(node)) for node in range(count)]
    for one in held:
        one.root.mkdir(parents=True, exist_ok=True)
    servers = [Server(one, "127.0.0.1", "token") for one in held]
    where = [("127.0.0.1", server.port) for server in servers]
    try:
        yield [
            {"root": str(one.root), "others": where[node + 1 :] + where[:node], "token": "token"}
            for node, one in enumerate(held)
        ]
    finally:
        for server in servers:
            server.close()


def train(
    memory: list[dict[str, Any]], attempt: int, run: dict[str, Any], base: str, folder: str, how: str = ""
) -> None:
    """A rank of a node of its own, or of the one there is; as `how` says, the second dies after step 5, or
    while it copies step 4 to its own memory or to its neighbour's."""
    rank = int(os.environ["RANK"])
    node = min(rank, len(memory) - 1)
    if len(memory) > 1:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ[ENVIRONMENT] = json.dumps(memory[node] | {"attempt": attempt})
    if how:
        die(how, last=rank == 1)
    train_here(run, base, folder)


def die(how: str, *, last: bool) -> None:
    from muster.checkpoint import memory, peers
    from muster.train.replicas import Replicas
    from muster.train.trainee import Trainee

    honest_update, honest_votes, honest_after = Trainee.update, Replicas.votes, Replicas.after

    # A refresh is over at the exchange that follows it, and committed before the next step, however fast steps are.
    def votes(replicas: Replicas, step: int) -> Any:
        replicas._work.wait()
        return honest_votes(replicas, step)

    def after(replicas: Replicas, step: int, votes: Any) -> None:
        honest_after(replicas, step, votes)
        if step == 5:
            replicas._work.wait()

    def update(trainee: Trainee, step: int, *arguments: Any, **more: Any) -> Any:
        if step == 5 and last:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest_update(trainee, step, *arguments, **more)

    def torn(pieces: Any) -> Iterator[Any]:
        for piece in pieces:
            yield piece[: len(piece) // 2]
            os.kill(os.getpid(), signal.SIGKILL)

    def put(honest: Any, where: int) -> Any:
        def put(self: Any, generation: Any, *arguments: Any) -> Any:
            if generation.step == 4 and last:
                arguments = (*arguments[:where], torn(arguments[where]))
            return honest(self, generation, *arguments)

        return put

    Replicas.votes, Replicas.after = votes, after  # type: ignore[method-assign]
    if how == "after":
        Trainee.update = update  # type: ignore[method-assign]
    elif how == "own":
        memory.Held.put = put(memory.Held.put, 1)  # type: ignore[method-assign]
    else:
        peers.Peer.put = put(peers.Peer.put, 2)  # type: ignore[method-assign]


def killed(run_ranks: Any, *arguments: Any) -> None:
    with pytest.raises(RuntimeError, match=r"rank . (died|failed)"):
        run_ranks(2, train, *arguments)


@pytest.mark.parametrize(("count", "how", "back_to"), [(1, "after", 4), (1, "own", 2), (2, "peer", 2)])
def test_of_a_death_in_a_refresh_the_older_generation_is_left(
    count: int, how: str, back_to: int, corpus: Path, straight: list[float], run_ranks: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with nodes(tmp_path / "memory", count) as memory:
        killed(run_ranks, memory, 1, a_run(), str(corpus), str(folder), how)
        run_ranks(2, train, memory, 2, a_run(), str(corpus), str(folder))
    (resumed,) = events(folder, "resumed")
    assert (resumed["step"], resumed["source"]) == (back_to, "memory")
    assert losses(folder) == straight


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(("every", "back_to"), [(NEVER, 2), ("3 steps", 3)])
def test_a_flipped_bit_is_found_and_named(
    every: str,
    back_to: int,
    corpus: Path,
    straight: list[float],
    run_ranks: Any,
    tmp_path: Path,
) -> None:
    folder, run = tmp_path / "run", a_run(every)
    with nodes(tmp_path / "memory", 1) as memory:
        killed(run_ranks, memory, 1, run, str(corpus), str(folder), "after")
        path = tmp_path / "memory/0/attempt-1/step-00000004/rank-00001.safetensors"
        flip(path)
        run_ranks(2, train, memory, 2, run, str(corpus), str(folder))
    (resumed,) = events(folder, "resumed")
    (named,) = events(folder, "memory-damaged")
    assert resumed["step"] == back_to
    assert (resumed["source"] == "memory") == (every == NEVER)  # whichever is newer
    assert named["message"].startswith(f"{path} does not match")
    assert "flipped bits" in named["message"]
    assert losses(folder) == straight


def test_a_flipped_bit_is_mended_from_the_neighbour(
    corpus: Path, straight: list[float], run_ranks: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with nodes(tmp_path / "memory", 2) as memory:
        killed(run_ranks, memory, 1, a_run(), str(corpus), str(folder), "after")
        bad = tmp_path / "memory/0/attempt-1/step-00000004/rank-00000.safetensors"
        flip(bad)
        run_ranks(2, train, memory, 2, a_run(), str(corpus), str(folder))
    (resumed,) = events(folder, "resumed")
    assert (resumed["step"], resumed["source"]) == (4, "memory")
    assert any(str(bad) in event["message"] for event in events(folder, "memory-damaged"))
    assert losses(folder) == straight


@pytest.mark.parametrize(("lost", "source"), [([1], "memory"), ([0, 1], "disk")])
def test_a_lost_node_is_replaced_and_two_neighbours_are_not(
    lost: list[int], source: str, corpus: Path, straight: list[float], run_ranks: Any, tmp_path: Path
) -> None:
    """Of three nodes two have ranks, and rank 1's copy is on the third."""
    folder, run = tmp_path / "run", a_run("3 steps")
    with nodes(tmp_path / "memory", 3) as memory:
        killed(run_ranks, memory, 1, run, str(corpus), str(folder), "after")
    for node in lost:
        shutil.rmtree(tmp_path / "memory" / str(node))
    with nodes(tmp_path / "memory", 3) as memory:
        run_ranks(2, train, memory, 2, run, str(corpus), str(folder))
    (resumed,) = events(folder, "resumed")
    if source == "memory":
        assert (resumed["step"], resumed["source"]) == (4, "memory")
    else:
        assert resumed["step"] == 3
        assert "without the shards of 1 of 2 ranks" in events(folder, "memory-incomplete")[0]["message"]
    assert losses(folder) == straight


def test_another_layout_goes_on_from_memory(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with nodes(tmp_path / "memory", 2) as memory:
        killed(run_ranks, memory, 1, a_run(), str(corpus), str(folder), "after")
        shutil.rmtree(tmp_path / "memory/1")
        run = a_run() | {"layout": {"tensor": 2}}
        run_ranks(2, train, memory[:1], 2, run, str(corpus), str(folder))
    (resumed,) = events(folder, "resumed")
    assert (resumed["step"], resumed["source"]) == (4, "memory")


def test_copies_that_train_apart_go_on_from_memory(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    run = a_run() | {"layout": {"replicate": 2}}
    run["train"] = run["train"] | {"sync": {"kind": "diloco", "every": 2}}
    run["checkpoint"] = run["checkpoint"] | {"memory": "1 steps"}
    run_ranks(2, train_here, run, str(corpus), str(tmp_path / "straight"))
    folder = tmp_path / "run"
    with nodes(tmp_path / "memory", 2) as memory:
        killed(run_ranks, memory, 1, run, str(corpus), str(folder), "after")
        run_ranks(2, train, memory, 2, run, str(corpus), str(folder))
    (resumed,) = events(folder, "resumed")
    assert resumed["source"] == "memory"
    assert losses(folder) == losses(tmp_path / "straight")


def test_no_room_is_said_once_and_the_run_goes_on(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with nodes(tmp_path / "memory", 1) as memory:
        run_ranks(2, train_without_room, memory, a_run(), str(corpus), str(folder))
    (said,) = events(folder, "memory-off")
    assert "checkpoint.memory: none" in said["message"]
    losses(folder)


def train_without_room(memory: list[dict[str, Any]], run: dict[str, Any], base: str, folder: str) -> None:
    from collections import namedtuple

    shutil.disk_usage = lambda path: namedtuple("usage", "free")(1 << 16)  # type: ignore[assignment,misc]
    train(memory, 1, run, base, folder)
