"""Offload to the host's memory and to disk: the same bits, little in memory at a time, nothing left behind."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from muster.config import schema
from muster.errors import DoesNotFit
from muster.train.adamw import AdamW
from muster.train.moments import InMemory, Mapped, MomentStore
from muster.train.optimizer import make_optimizer
from tests.ranks.test_resume import EVERY_STEP, train_and_stop, weights_of
from tests.toy import STEPS, tiny, train_here, write_corpus

CONFIG = schema.Optimizer(lr=0.01)
BLOCKS, WIDTH = 6, 512
UNIT_BYTES = 2 * 4 * (WIDTH * WIDTH + WIDTH)
"""Moments of one block of `tower`."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="offload to disk is for Linux")


def tower(width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleDict({str(n): nn.Linear(width, width) for n in range(BLOCKS)})})


def train(model: nn.Module, store: MomentStore, steps: int = 4) -> AdamW:
    optimizer = AdamW(dict(model.named_parameters()), CONFIG, store)
    for step in range(steps):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step(0.01)
    return optimizer


@linux_only
def test_mapped_moments_give_the_same_bits(tmp_path: Path) -> None:
    in_memory, mapped = tower(33), tower(33)
    expected, states = train(in_memory, InMemory()).state(), train(mapped, Mapped(tmp_path)).state()
    assert states.keys() == expected.keys()
    assert all(torch.equal(states[name], expected[name]) for name in expected)
    assert all(torch.equal(p, q) for p, q in zip(in_memory.parameters(), mapped.parameters(), strict=True))


@linux_only
def test_the_file_has_no_name_that_could_stay_behind(tmp_path: Path) -> None:
    optimizer = train(tower(33), Mapped(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert mapped_bytes(tmp_path)["Size"] > 0
    del optimizer
    assert mapped_bytes(tmp_path)["Size"] == 0


@linux_only
def test_about_one_unit_is_in_memory_at_a_time(tmp_path: Path) -> None:
    class Watched(Mapped):
        @contextmanager
        def loaded(self, unit: str) -> Iterator[None]:
            with super().loaded(unit):
                yield
                within.append(mapped_bytes(tmp_path)["Rss"])

    within: list[int] = []
    optimizer = train(tower(), Watched(tmp_path))
    slack = 16 * mmap.PAGESIZE  # the kernel maps a few pages around the one that was asked for
    assert mapped_bytes(tmp_path)["Size"] >= BLOCKS * UNIT_BYTES
    assert UNIT_BYTES <= max(within) <= UNIT_BYTES + slack
    assert mapped_bytes(tmp_path)["Rss"] <= slack
    assert optimizer.state()["exp_avg.layers.0.weight"].any()


@linux_only
def test_the_unit_behind_is_read_while_one_is_updated(tmp_path: Path) -> None:
    store = Mapped(tmp_path)
    optimizer = train(tower(), store, steps=1)
    start = optimizer.state()["exp_avg.layers.1.weight"].data_ptr()
    for moment in optimizer.state().values():
        moment.sum()  # only what is mapped can be sent out
    store._map.flush()
    store._map.madvise(21)  # MADV_PAGEOUT of linux/mman.h: out of the page cache as well
    if cached_bytes(start, UNIT_BYTES):
        pytest.skip("this file system keeps its pages")
    left = mapped_bytes(tmp_path)["Rss"]  # a page that the kernel is busy with stays
    with store.loaded("layers.0"):
        deadline = time.monotonic() + 30
        while cached_bytes(start, UNIT_BYTES) < UNIT_BYTES and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cached_bytes(start, UNIT_BYTES) >= UNIT_BYTES
        assert mapped_bytes(tmp_path)["Rss"] <= left < UNIT_BYTES, (
            "read by the kernel, not by a look at every page"
        )


@linux_only
def test_too_small_a_disk_is_told_with_figures_and_left_alone(tmp_path: Path) -> None:
    huge = nn.ParameterDict({"w": nn.Parameter(torch.zeros(1).expand(2**50))})
    with pytest.raises(
        DoesNotFit, match=r"cannot reserve 9\.01e\+06 GB .* which has [0-9.e+]+ GB free .*: free some"
    ):
        make_optimizer(dict(huge.named_parameters()), CONFIG, compute=torch.float32, scratch=tmp_path)


@linux_only
def test_a_file_that_cannot_be_reserved_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (UNIT_BYTES, hard))
    try:
        with pytest.raises(DoesNotFit, match=r"cannot reserve 0\.0126 GB .*File too large"):
            make_optimizer(dict(tower().named_parameters()), CONFIG, compute=torch.float32, scratch=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def mapped_bytes(folder: Path) -> dict[str, int]:
    """Size and Rss, in bytes, of this process's mappings of files in `folder`."""
    total = {"Size": 0, "Rss": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split(maxsplit=1)
        if not head.endswith(":"):  # a mapping's first line: its addresses, and its file at the end
            inside = str(folder) in line
        elif inside and head[:-1] in total:
            total[head[:-1]] += int(rest[0].removesuffix("kB")) * 1024
    return total


def cached_bytes(start: int, size: int) -> int:
    """How much of a mapped range is in the kernel's page cache, mapped here or not."""
    pages = -(-size // mmap.PAGESIZE)
    here = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), here) == 0
    return sum(page & 1 for page in here) * mmap.PAGESIZE


# Whole runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


LAYOUTS: list[dict[str, Any]] = [{}, {"shard": 2, "zero": 3}, {"shard": 2, "zero": 1, "microbatch": 1}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_offloaded_runs_give_the_same_bits(
    layout: dict[str, Any], corpus: Path, run_ranks: Any, tmp_path: Path
) -> None:
    ranks = layout.get("shard", 1)
    weights = {}
    for offload in ("none", "cpu", "disk"):
        folder = tmp_path / offload
        run = tiny(layout=layout | {"offload": offload})
        run["train"] = run["train"] | {"precision": "bf16"}
        run_ranks(ranks, train_here, run, str(corpus), str(folder))
        weights[offload] = weights_of(folder)
        assert not [path for path in folder.iterdir() if path.name.startswith("tmp")]
    for name, expected in weights["none"].items():
        assert torch.equal(weights["cpu"][name], expected), name
        assert torch.equal(weights["disk"][name], expected), name


def test_muon_from_the_hosts_memory(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    weights = []
    for offload in ("none", "cpu"):
        run = tiny(layout={"shard": 2, "zero": 3, "offload": offload})
        run["train"] = run["train"] | {"optimizer": {"kind": "muon", "lr": 1e-3}}
        run_ranks(2, train_here, run, str(corpus), str(tmp_path / offload))
        weights.append(weights_of(tmp_path / offload))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@linux_only
def test_resuming_between_disk_and_memory_is_bitwise(corpus: Path, run_ranks: Any, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    in_memory, on_disk = (
        tiny(layout={"shard": 2, "zero": 3, "offload": offload}, checkpoint=EVERY_STEP)
        for offload in ("none", "disk")
    )
    run_ranks(2, train_here, in_memory, str(corpus), str(straight))
    run_ranks(2, train_and_stop, on_disk, str(corpus), str(broken), 2)
    run_ranks(2, train_and_stop, in_memory, str(corpus), str(broken), 4)
    run_ranks(2, train_here, on_disk, str(corpus), str(broken))
    expected, resumed = weights_of(straight), weights_of(broken)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert (broken / "checkpoints" / f"step-{STEPS:08d}").exists()
