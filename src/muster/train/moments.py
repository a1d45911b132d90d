"""Where an optimizer's moments live: in memory, or in a file that is streamed unit by unit.

The file is ZeRO-Infinity's disk (Rajbhandari et al. 2021) on the kernel's page cache: mapped into
memory, so that the optimizer's kernel reads and writes it in place and the numbers are those of tensors
in memory. Knows parameters and their units, and no optimizer.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from muster.errors import DoesNotFit, UsageError

Parameters = Mapping[str, nn.Parameter]

_ALIGNMENT_BYTES = 64  # a cache line, as torch's allocator aligns
_READ_AHEAD_BYTES = 128 * 1024
"""The kernel cuts one request for read-ahead to the disk's `read_ahead_kb`, whose usual value this is (measured: 8 MB
of a request for 256 MB were read, where that value was 8 MB)."""


class MomentStore(Protocol):
    def zeros(self, units: Mapping[str, Parameters], kinds: Sequence[str]) -> dict[str, Tensor]:
        """A tensor of zeros like each parameter of each unit, for each kind, by `kind.name`; called once."""

    def loaded(self, unit: str) -> AbstractContextManager[None]:
        """The unit's moments are at hand within; units come in the order in which `zeros` was given them."""


class InMemory:
    """Moments beside their parameters."""

    def zeros(self, units: Mapping[str, Parameters], kinds: Sequence[str]) -> dict[str, Tensor]:
        named = {name: p for members in units.values() for name, p in members.items()}
        return {f"{kind}.{name}": torch.zeros_like(p) for kind in kinds for name, p in named.items()}

    def loaded(self, unit: str) -> AbstractContextManager[None]:
        return nullcontext()


class Mapped:
    """Moments in one file of this rank; parameters must be in the host's memory.

    The file has no name, so it is gone with the process, however that ends: it is scratch, and the
    checkpoint is the truth. While one unit is updated the next one is read; pages of a finished unit leave this
    process, so that it holds about one unit at a time, and the kernel writes them back when it wants.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is an existing folder for the file."""
        self._folder = folder

    def zeros(self, units: Mapping[str, Parameters], kinds: Sequence[str]) -> dict[str, Tensor]:
        """DoesNotFit where the folder has no room for the file."""
        places: dict[str, tuple[int, nn.Parameter]] = {}
        self._spans: dict[str, range] = {}
        end = 0
        for unit, members in units.items():
            start = end
            for kind in kinds:
                for name, parameter in members.items():
                    places[f"{kind}.{name}"] = (end, parameter)
                    end = _up(end + _local(parameter).nbytes, _ALIGNMENT_BYTES)
            end = _up(end, mmap.PAGESIZE)
            self._spans[unit] = range(start, end)
        self._map = self._reserve(end)
        return {name: self._view(place, parameter) for name, (place, parameter) in places.items()}

    @contextmanager
    def loaded(self, unit: str) -> Iterator[None]:
        order = list(self._spans)
        self._read_ahead(order[(order.index(unit) + 1) % len(order)])
        yield
        self._release(unit)

    def _reserve(self, size: int) -> mmap.mmap:
        """The file, with every byte of it set aside on the disk, so that training cannot run out of room."""
        if not hasattr(os, "posix_fallocate"):
            raise UsageError("layout.offload: disk needs Linux to reserve its file: write offload: cpu")
        size = max(size, mmap.PAGESIZE)
        disk = os.statvfs(self._folder)
        free = disk.f_bavail * disk.f_frsize
        try:
            if size > free:  # asked first, as the attempt would fill the disk for everybody else
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise DoesNotFit(
                f"cannot reserve {size / 1e9:.3g} GB for this rank's moments in {self._folder}, which has "
                f"{free / 1e9:.3g} GB free ({error.strerror}): free some space, take more ranks on layout.shard, "
                f"or write layout.offload: cpu"
            ) from error

    @torch.no_grad()
    def _view(self, place: int, parameter: nn.Parameter) -> Tensor:
        moment = torch.empty_like(parameter)
        local = _local(moment)
        if (
            local.numel()
        ):  # on a mesh of GPUs DTensor.from_local would move this tensor there, so it is set in place
            mapped = torch.frombuffer(self._map, dtype=local.dtype, count=local.numel(), offset=place)
            local.set_(mapped.view(local.shape))  # type: ignore[call-overload]
        return moment

    def _read_ahead(self, unit: str) -> None:
        span = self._spans[unit]
        for start in span[::_READ_AHEAD_BYTES]:
            self._map.madvise(mmap.MADV_WILLNEED, start, min(_READ_AHEAD_BYTES, span.stop - start))

    def _release(self, unit: str) -> None:
        if span := self._spans[
            unit
        ]:  # of a shared file this drops the process's hold, and never what was written
            self._map.madvise(mmap.MADV_DONTNEED, span.start, len(span))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
