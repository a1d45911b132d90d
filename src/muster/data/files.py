"""Files that are either whole or absent, one writer at a time, and one sentence when the disk is full."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from muster.errors import DataError

PARTIAL = ".partial"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` if the block ends well, and leaves nothing behind otherwise."""
    # The process id keeps writers apart that no lock keeps apart.
    draft = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise DataError(
                f"no space left for {path} ({free / 1e6:.1f} MB free): make room there and run again, "
                f"which continues where this stopped"
            ) from None
        raise
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes) -> None:
    with atomic(path) as file:
        file.write(content)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that one process of the machine has at a time; a killed holder lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_drafts(folder: Path) -> None:
    """Delete what killed writers left anywhere below; the caller holds the lock."""
    for draft in folder.rglob(f"*{PARTIAL}"):
        draft.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
