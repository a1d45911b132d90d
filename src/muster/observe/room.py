"""Records and progress lines on a disk that takes no more: training goes on, and they wait or are left out."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections import deque
from collections.abc import Iterator
from io import FileIO

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MOST_WAITING = 10_000


@contextlib.contextmanager
def or_not_at_all() -> Iterator[None]:
    """A body that may be left half done where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise


def say(sentence: str) -> None:
    """A line on standard output, which may be a file on a full disk."""
    with or_not_at_all():
        sys.stdout.write(sentence + "\n")
        sys.stdout.flush()


class Appender:
    """Whole lines to the end of a file. Those that the disk has no room for wait in memory, and go with a later one."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._waiting = deque[bytes](maxlen=_MOST_WAITING)

    def write(self, line: bytes) -> None:
        self._waiting.append(line)
        with contextlib.suppress(OSError):  # whatever is wrong with that disk, the run is worth more
            while self._waiting:
                written = self._file.write(self._waiting[0])
                if written < len(self._waiting[0]):
                    self._waiting[0] = self._waiting[0][written:]
                else:
                    self._waiting.popleft()
