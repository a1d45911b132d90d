"""The shelf of checkpoints: damage is found and named, the newest sound one is taken, old ones go."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from muster.checkpoint import manifest, shelf
from muster.checkpoint.manifest import Manifest, sum_file
from muster.checkpoint.sealed import SEAL, seal
from muster.errors import CheckpointError


def place(folder: Path, step: int, size: int = 1000) -> Path:
    """A complete checkpoint of two files of random bytes."""
    partial = shelf.partial_of(folder, step)
    partial.mkdir(parents=True)
    names = ("rank-00000.safetensors", "rank-00001.safetensors")
    for name in names:
        (partial / name).write_bytes(random.Random(f"{step}{name}").randbytes(size))
    content = Manifest(
        format=manifest.FORMAT, step=step, tokens=step * 10, seed=0, digest="d", identity={"a": 1}, layout={},
        model={}, versions={}, files={name: sum_file(partial / name) for name in names},
    )  # fmt: skip
    return shelf.commit(folder, step, content)


def newest(folder: Path) -> tuple[int | None, list[str]]:
    damaged: list[str] = []
    found = shelf.newest_sound(folder, on_damaged=damaged.append)
    return (None if found is None else found[1].step), damaged


def test_an_empty_shelf_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])


def test_a_manifest_reads_back(tmp_path: Path) -> None:
    folder = place(tmp_path, 7)
    assert manifest.read(folder) == manifest.verify(folder)
    assert manifest.read(folder).tokens == 70


@pytest.mark.parametrize("seed", range(40))
def test_any_flipped_bit_is_found_and_the_older_one_taken(tmp_path: Path, seed: int) -> None:
    place(tmp_path, 10)
    folder = place(tmp_path, 20)
    chance = random.Random(seed)
    victim = chance.choice(sorted(path for path in folder.iterdir() if path.suffix == ".safetensors"))
    content = bytearray(victim.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    victim.write_bytes(content)
    step, damaged = newest(tmp_path)
    assert step == 10
    assert len(damaged) == 1
    assert victim.name in damaged[0]


def test_a_cut_or_missing_or_swapped_file_is_named(tmp_path: Path) -> None:
    for step, harm in enumerate(("cut", "missing", "swapped")):
        folder = place(tmp_path / harm, step)
        first, second = folder / "rank-00000.safetensors", folder / "rank-00001.safetensors"
        if harm == "cut":
            first.write_bytes(first.read_bytes()[:-1])
        elif harm == "missing":
            first.unlink()
        else:
            first.write_bytes(second.read_bytes())
        with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
            manifest.verify(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"files": {"a": 3}}', '{"files": 3}'])
def test_a_damaged_manifest_is_an_error_of_ours(tmp_path: Path, text: str) -> None:
    folder = place(tmp_path, 1)
    (folder / manifest.NAME).write_text(text)
    with pytest.raises(CheckpointError):
        manifest.verify(folder)


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = place(tmp_path, 1)
    path = folder / manifest.NAME
    plain = json.loads(path.read_text().replace("rank-00000.safetensors", "../../etc/passwd"))
    del plain[SEAL]
    path.write_bytes(seal(plain))
    with pytest.raises(CheckpointError, match="outside"):
        manifest.verify(folder)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (place(tmp_path, step) / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 2"):
        newest(tmp_path)


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        place(tmp_path, step)
    shelf.retain(tmp_path, keep=2)
    assert shelf.steps(tmp_path) == [20, 100]


def test_a_half_written_one_does_not_exist_and_is_swept(tmp_path: Path) -> None:
    place(tmp_path, 1)
    half = shelf.partial_of(tmp_path, 2)
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"x")
    half_deleted = place(tmp_path, 3)
    (half_deleted / manifest.NAME).unlink()
    assert newest(tmp_path)[0] == 1
    shelf.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
