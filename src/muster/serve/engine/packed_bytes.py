"""The bytes of a packed file in huge pages, read and summed on several threads.

Knows no torch, and so begins while torch is still being imported: the second that this takes is enough for a gigabyte.
What the bytes mean is `packed_file.py`'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muster.errors import UsageError
from muster.model.config_json import PACKED_PREFIX

_PAGE_BYTES = 2 << 20
_THREADS = 4


def packed_path(folder: Path, format: str) -> Path:
    """Where the packed weights of the model in `folder` are kept."""
    return folder / f"{PACKED_PREFIX}{format}.safetensors"


def huge_memory(count: int) -> memoryview:
    """`count` bytes which begin a page of 2 MB, where the system has such pages; zeros.

    A decoding step reads every weight once, and the processor's prefetching stops at each page: measured 44 instead of
    33 GB/s on two cores (one product with one row, bf16). Private memory: that which could be shared, Python's default,
    gets no such pages from a Linux as it comes.
    """
    mapped = mmap.mmap(-1, count + _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them: ordinary pages do
            mapped.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(mapped)) % _PAGE_BYTES
    return memoryview(mapped)[begin : begin + count]


@dataclass(frozen=True, slots=True)
class PackedBytes:
    """A sound packed file."""

    about: dict[str, Any]
    """What its writer says of it."""
    index: dict[str, Any]
    """Of each tensor `dtype`, `shape` and `data_offsets`."""
    data: memoryview


def read_bytes(path: Path) -> PackedBytes:
    """Read a packed file; UsageError where it is damaged."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            index = json.loads(file.read(min(header_bytes, size)))
            metadata = index.pop("__metadata__")
            about = json.loads(metadata["muster"])
            begin = 8 + header_bytes
            spans = [tuple(entry["data_offsets"]) for entry in index.values()]
            if max(last for _, last in spans) != size - begin:
                raise ValueError("its size is not as its header says")
            data = huge_memory(size - begin)

            def read(span: tuple[int, int]) -> int:
                place, last = span
                while place < last:
                    count = os.preadv(file.fileno(), [data[place:last]], begin + place)
                    if not count:
                        raise ValueError("it is cut off")
                    place += count
                return zlib.crc32(data[slice(*span)])

            with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as pool:
                found = checksum(about, index, list(pool.map(read, spans)))
        if metadata["crc32"] != found:
            raise ValueError("its checksum differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}): remove it, and it is made anew") from None
    return PackedBytes(about, index, data)


def checksum(about: dict[str, Any], index: dict[str, Any], sums: Sequence[int]) -> str:
    """Of all of a file, from the checksum of each tensor in the order of the index."""
    return f"{zlib.crc32(json.dumps([about, index, list(sums)], sort_keys=True).encode()):08x}"


class ReadAhead:
    """Begins at once to read the packed file of a model's folder, if there is one, and is then used as `read_bytes`."""

    def __init__(self, folder: Path, format: str) -> None:
        self._path = packed_path(folder, format)
        self._future: Future[PackedBytes] | None = None
        if self._path.exists():
            with contextlib.suppress(RuntimeError):  # the process is about to end
                self._future = ThreadPoolExecutor(1).submit(read_bytes, self._path)

    def __call__(self, path: Path) -> PackedBytes:
        future, self._future = self._future, None  # once: what is read is not kept here
        return future.result() if future is not None and path == self._path else read_bytes(path)
