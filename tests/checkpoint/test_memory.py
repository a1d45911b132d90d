"""The memory of a node: what is kept in it, who may put files there, and what becomes of the folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from muster.checkpoint.keeper import PREFIX, Keeper
from muster.checkpoint.manifest import FORMAT, FileSum, Manifest
from muster.checkpoint.memory import Generation, Held
from muster.checkpoint.peers import Peer, Server
from muster.errors import CheckpointError

NAME = "rank-00000.safetensors"
CONTENT = bytes(range(256)) * 20_000
SUM = FileSum(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
FIRST, SECOND, THIRD = Generation(1, 10), Generation(1, 20), Generation(2, 20)


def manifest(step: int) -> Manifest:
    return Manifest(
        format=FORMAT, step=step, tokens=0, seed=0, digest="", identity={}, layout={}, model={}, versions={}, files={}
    )  # fmt: skip


@pytest.fixture
def held(tmp_path: Path) -> Held:
    (tmp_path / "memory").mkdir()
    return Held(tmp_path / "memory")


@pytest.fixture
def server(held: Held) -> Iterator[Server]:
    with contextlib.closing(Server(held, "127.0.0.1", "secret")) as server:
        yield server


@pytest.fixture
def peer(server: Server) -> Peer:
    return Peer(("127.0.0.1", server.port), "secret")


def folders(held: Held) -> list[str]:
    return sorted(str(path.relative_to(held.root)) for path in held.root.glob("*/*"))


def test_the_newest_stays_until_the_next_is_committed(held: Held) -> None:
    for generation in (FIRST, SECOND):
        assert held.put(generation, NAME, [CONTENT]) == SUM
        held.commit(generation, manifest(generation.step))
    assert list(held.generations()) == [FIRST, SECOND]
    assert 2 * SUM.bytes < held.size_bytes() < 3 * SUM.bytes
    held.put(THIRD, NAME, [CONTENT[:9]])  # as it is left by whoever dies here
    assert folders(held) == ["attempt-1/step-00000020", "attempt-2/step-00000020.partial"]
    assert {one: content.files for one, content in held.generations().items()} == {SECOND: {NAME: SUM}}
    held.keep(SECOND)
    assert folders(held) == ["attempt-1/step-00000020"]
    held.keep(None)
    assert folders(held) == []


def test_files_go_to_a_peer_and_come_back(held: Held, peer: Peer, tmp_path: Path) -> None:
    peer.put(FIRST, NAME, SUM, [CONTENT[:70_000], CONTENT[70_000:]])
    assert peer.generations() == {}
    peer.commit(FIRST, manifest(10))
    assert peer.generations()[FIRST].files == {NAME: SUM}
    assert peer.get(FIRST, NAME, tmp_path / "back") == SUM
    assert (tmp_path / "back").read_bytes() == CONTENT
    peer.keep(None)
    assert held.generations() == {}


def test_a_peer_keeps_nothing_that_is_not_as_it_was_said_to_be(held: Held, peer: Peer) -> None:
    with pytest.raises(ConnectionError, match="did not arrive as it was sent"):
        peer.put(FIRST, NAME, SUM, [b"\1" + CONTENT[1:]])
    peer.commit(FIRST, manifest(10))
    assert held.generations() == {}
    with pytest.raises(ConnectionError, match="no room for"):
        peer.put(FIRST, NAME, FileSum(1 << 60, ""), [])


@pytest.mark.parametrize("name", ["../../stolen", "manifest.json", "rank-00000.safetensors/../../x", ""])
def test_other_names_are_refused(name: str, held: Held, peer: Peer, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        peer.put(FIRST, name, SUM, [CONTENT])
    with pytest.raises(ConnectionError):
        peer.get(FIRST, name, tmp_path / "back")
    with pytest.raises(CheckpointError, match="not the name of a rank's file"):
        held.put(FIRST, name, [CONTENT])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_stranger_gets_nothing(held: Held, server: Server, tmp_path: Path) -> None:
    held.put(FIRST, NAME, [CONTENT])
    stranger = Peer(("127.0.0.1", server.port), "guessed")
    with pytest.raises(ConnectionError, match="a stranger"):
        stranger.generations()
    with pytest.raises(ConnectionError, match="a stranger"):
        stranger.put(FIRST, NAME, SUM, [CONTENT])


def test_what_a_dead_agent_left_goes_with_the_next_one(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from muster.checkpoint.keeper import Keeper\n"
        "Keeper('0' * 64, Path(sys.argv[1])).claim(); print('claimed', flush=True); time.sleep(600)"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ, text=True
    )
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline() == "claimed\n"
        (left,) = tmp_path.glob(f"{PREFIX}*")
        strange = tmp_path / "muster-ranks-of-somebody"
        strange.mkdir()
        keeper = Keeper("1" * 64, tmp_path)
        keeper.claim()
        assert left.exists()  # its agent lives
        keeper.close()
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        keeper.claim()
        assert not left.exists()
        keeper.close()
        assert list(tmp_path.iterdir()) == [strange]
    finally:
        agent.kill()
        agent.wait()
        agent.communicate()


def test_a_machine_without_tmpfs_keeps_nothing(tmp_path: Path) -> None:
    keeper = Keeper("0" * 64, tmp_path / "missing")
    keeper.claim()
    assert keeper.serve("127.0.0.1") is None
    assert keeper.environment(1, []) == {}
    assert keeper.newest() == 0
    keeper.close()
