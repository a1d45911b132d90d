"""The world of ranks: who am I, how many are we, which device is mine.

A rank learns its place from the environment that torch's elastic agent or `torchrun` sets.
State is passed on as a `World`; nothing here is a global.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


@dataclass(frozen=True, slots=True)
class World:
    """One rank's view of the process group it has joined."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Of these ranks; None for all."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def members(self) -> list[int]:
        """The ranks by their number among all."""
        return list(range(self.size)) if self.group is None else dist.get_process_group_ranks(self.group)

    def sum(self, *values: float) -> list[float]:
        """The sums of `values` over all ranks, in float64, equal on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return [float(value) for value in total.tolist()]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)


def is_rank() -> bool:
    """True in a process that an elastic agent (ours or `torchrun`) started as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def join(timeout_s: float = 600.0, *, on_cpu: bool = False) -> Iterator[World]:
    """Join the process group that the environment describes, and leave it at the end; `on_cpu`: without GPUs."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and not on_cpu
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads_per_rank())
        keep_freed_memory()
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s)
    )
    try:
        yield World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, which needs the same again.

    Otherwise large tensors go back to the kernel each time and come back a page fault at a time: measured 100,000
    faults and 4 to 9 % of a step at 60 M parameters.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def threads_per_rank() -> int:
    """CPU threads of one rank: the local ranks share the physical cores; OMP_NUM_THREADS has the last word."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    return max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def usable_cores() -> int:
    """Physical cores that this process may run on."""
    allowed = (
        len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    )
    return max(min(psutil.cpu_count(logical=False) or 1, allowed or 1), 1)
