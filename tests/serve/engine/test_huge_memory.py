"""What a step reads lies in huge pages wherever the system gives them to whoever asks."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from muster.serve.engine.packed_bytes import huge_memory

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_BYTES = 2 << 20


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="the system has no huge pages"
)
def test_memory_of_weights_is_in_huge_pages() -> None:
    """Ordinary settings of a Linux count: shared memory gets huge pages only by an extra one."""
    memory = huge_memory(16 * HUGE_BYTES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert address % HUGE_BYTES == 0
    memory[:] = b"\1" * len(memory)
    assert huge_kilobytes(address) >= 8 * HUGE_BYTES >> 10, "most, even where memory is in many pieces"


def test_memory_of_weights_begins_as_zeros_and_has_its_size() -> None:
    memory = huge_memory(12345)
    assert memory == bytes(12345)


def huge_kilobytes(address: int) -> int:
    """Of the mapping at an address, as the kernel counts."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")
