"""A snapshot is the bytes of its file: what safetensors reads from it is what was copied, of one step."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from muster.checkpoint.background import Background
from muster.checkpoint.manifest import write_summed
from muster.checkpoint.snapshot import Snapshot, arrange, stream
from muster.checkpoint.state import read_shards, write_file, write_shards
from muster.errors import DoesNotFit


def state() -> dict[str, torch.Tensor]:
    return {
        "weights.a": torch.randn(5, 3),
        "weights.half": torch.randn(7).bfloat16(),
        "weights.turned": torch.randn(4, 6).t(),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
        "exp_avg.a": torch.randn(5, 3),
    }


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = state()
    snapshot = Snapshot(tensors, owns_whole=True)
    snapshot.take(tensors, 3)
    write_summed(tmp_path / "snapshot.safetensors", snapshot.pieces())
    write_summed(tmp_path / "streamed.safetensors", stream(tensors, arrange(tensors, owns_whole=True)))
    assert (tmp_path / "snapshot.safetensors").read_bytes() == (
        tmp_path / "streamed.safetensors"
    ).read_bytes()
    read = load_file(tmp_path / "snapshot.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "snapshot.safetensors", "pt") as file:
        assert "DCP_SHARDING_INFO" in file.metadata()


def test_every_tensor_is_aligned_as_the_library_does_it(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state().items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    arrangement = arrange(tensors, owns_whole=True)
    assert len(arrangement.header()) % 8 == 0
    assert all(shard.start % shard.dtype.itemsize == 0 for shard in arrangement.shards)
    assert sum(tensor.nbytes for tensor in tensors.values()) == arrangement.size_bytes
    ours = b"".join(stream(tensors, arrangement))
    assert theirs[-arrangement.size_bytes :] == ours[-arrangement.size_bytes :]


def test_the_copy_is_of_the_step_it_was_taken_at(tmp_path: Path) -> None:
    tensors = state()
    snapshot = Snapshot(tensors, owns_whole=True)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    memory = snapshot.body.data_ptr()
    snapshot.take(tensors, 1)
    for tensor in tensors.values():
        tensor.zero_()
    assert all(torch.equal(snapshot.tensors()[name], before[name]) for name in before)
    snapshot.take(tensors, 2)
    assert snapshot.step == 2
    assert not snapshot.body.any()
    assert snapshot.body.data_ptr() == memory  # no more memory for the second than for the first


def test_a_rank_that_does_not_own_what_is_whole_keeps_nothing() -> None:
    assert Snapshot(state(), owns_whole=False).arrangement.size_bytes == 0


def test_a_written_state_reads_back(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in state().items() if name != "nothing"}
    write_shards(tensors, tmp_path, 0, owns_whole=True)
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read_shards(read, tmp_path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_writing_holds_no_second_copy(tmp_path: Path) -> None:
    tensors = {str(number): torch.zeros(1_000_000) for number in range(16)}
    tracemalloc.start()
    try:
        write_summed(tmp_path / "file", stream(tensors, arrange(tensors, owns_whole=True)))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_the_sum_is_that_of_the_file(tmp_path: Path) -> None:
    summed = write_summed(tmp_path / "file", [b"ab", b"", b"c" * 1000])
    content = (tmp_path / "file").read_bytes()
    assert (summed.bytes, summed.sha256) == (1002, hashlib.sha256(content).hexdigest())


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """/dev/full refuses as a full disk does."""
    (tmp_path / "rank-00000.safetensors").symlink_to("/dev/full")
    with pytest.raises(DoesNotFit, match=r"cannot write 0 MB .* MB free \(No space left on device\)"):
        write_file([b"x" * 100], 100, tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-00000.refused"]
    assert "No space left" in (tmp_path / "rank-00000.refused").read_text()


def test_work_in_the_background() -> None:
    work = Background()
    assert work.take() is None
    done: list[int] = []
    work.start(lambda: done.append(1))
    assert work.take() is None
    assert done == [1]

    def fail() -> None:
        raise DoesNotFit("full")

    for here in (False, True):
        work.start(fail, here=here)
        work.wait()
        assert work.failed
        assert isinstance(work.take(), DoesNotFit)
        assert not work.failed

    def be_wrong() -> None:
        raise ZeroDivisionError

    work.start(be_wrong)
    with pytest.raises(ZeroDivisionError):
        work.take()
