"""Whether the kernel has ended processes here because memory ran out, and how much a process holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def oom_kills() -> int:
    """Processes that the kernel has ended for memory in our control group, or on this machine where none is told."""
    for file in [*_counters(), Path("/proc/vmstat")]:
        try:
            words = dict(line.split()[:2] for line in file.read_text().splitlines() if " " in line)
            return int(words["oom_kill"])
        except (OSError, KeyError, ValueError):
            continue
    return 0


def resident_bytes(pid: int) -> int:
    """What a process holds in memory; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def _counters() -> Iterator[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield _CGROUPS / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield _CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"
            yield _CGROUPS / "memory" / "memory.oom_control"  # within a container, the root is ours
