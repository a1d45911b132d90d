"""Whatever byte a save dies at, and whatever bit flips: a few trials of benchmarks/faults_checkpoint.py."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults_checkpoint as faults
from muster.checkpoint import manifest, shelf
from muster.checkpoint.state import read_shards
from muster.cli._verify import damage


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A shelf with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        faults.save_one(tmp_path / "shelf", step)
    return tmp_path / "shelf"


@pytest.fixture(scope="module", autouse=True)
def _forkserver(run_ranks: Any) -> None:
    """Children come from the session's one server, which has to have preloaded what other tests need."""


def test_a_crash_at_every_call_of_a_save(tmp_path: Path) -> None:
    outcome = faults.crash_at_every_call(tmp_path)
    assert outcome.trials > 20
    assert outcome.unloadable == []


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_kill_9_at_random_moments_of_saving(kills: int, tmp_path: Path) -> None:
    outcome = faults.kill_at_random(tmp_path, kills, seed=kills)
    assert (outcome.trials, outcome.unloadable) == (kills, [])


@pytest.mark.parametrize("flips", [30, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.timeout(900)
def test_every_flipped_bit_is_found_and_its_file_named(flips: int, two: Path) -> None:
    outcome = faults.flip_bits(shelf.folder_of(two, 2), flips, seed=flips, find=damage)
    assert (outcome.trials, outcome.unloadable) == (flips, [])


def test_what_is_wrong_is_named(two: Path) -> None:
    folder = shelf.folder_of(two, 2)
    first, second = folder / "rank-00000.safetensors", folder / "rank-00001.safetensors"
    aside = folder / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    assert [line.split(": ")[0] for line in damage(folder)] == [
        f"{first} holds what rank-00001.safetensors should (the files were exchanged)",
        f"{second} holds what rank-00000.safetensors should (the files were exchanged)",
    ]
    first.write_bytes(b"short")
    second.unlink()
    shutil.copy(first, folder / "rank-00002.safetensors")
    (folder / "notes.txt").write_text("x")
    said = damage(folder)
    assert [str(path) in line for path, line in zip((first, second), said, strict=False)] == [True, True]
    assert "has 5 bytes instead of" in said[0]
    assert "is missing" in said[1]
    assert "rank-00002.safetensors is not in the manifest" in said[2]
    assert "notes.txt is not in the manifest" in said[3]


def test_a_shard_too_many_is_not_read(two: Path) -> None:
    """A loader would take it for a part of the state."""
    folder = shelf.folder_of(two, 2)
    shutil.copy(folder / "rank-00000.safetensors", folder / "rank-00007.safetensors")
    said: list[str] = []
    found = shelf.newest_sound(two, said.append)
    assert found is not None
    assert found[1].step == 1
    assert "rank-00007" in said[0]


def test_a_stray_file_costs_no_checkpoint(two: Path) -> None:
    (shelf.folder_of(two, 2) / ".nfs0001").write_text("x")
    assert faults.what_loads(two) == 2


PLANTED = b"cos\nsystem\n(S'touch %s'\ntR."
"""A pickle that runs a command when it is loaded."""


@pytest.mark.parametrize(
    "slot", ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json", ".metadata"]
)
def test_a_planted_pickle_is_not_executed(slot: str, two: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    (shelf.folder_of(two, 2) / slot).write_bytes(PLANTED % str(trace).encode())
    said: list[str] = []
    found = shelf.newest_sound(two, said.append)
    assert found is not None
    assert damage(shelf.folder_of(two, 2))
    state = {name: t for rank in (0, 1) for name, t in faults.state_of(1, rank, 30_000).items()}
    with contextlib.suppress(Exception):  # whatever it says of a shard that is none
        read_shards(state, shelf.folder_of(two, 2))
    assert not trace.exists()


def test_a_manifest_of_format_1_is_read(two: Path) -> None:
    path = shelf.folder_of(two, 2) / manifest.NAME
    plain = json.loads(path.read_bytes()) | {"format": 1}
    del plain["own_sha256"], plain["held_out_loss"]
    path.write_text(json.dumps(plain, indent=1))
    assert faults.what_loads(two) == 2
    path.write_text(json.dumps(plain | {"format": 3}, indent=1))
    assert "its own checksum is missing" in damage(path.parent)[0]
