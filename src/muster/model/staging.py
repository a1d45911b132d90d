"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from muster.errors import UsageError


@contextmanager
def staged(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the block ends, and goes when it raises.

    An existing folder with anything in it is refused (UsageError); with `replace`, the new one supersedes it.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: choose another folder, or remove it")
    if not replace and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} already holds files: choose another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    draft.mkdir()
    try:
        yield draft
        _sync(draft)
        _take_place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _take_place(draft: Path, folder: Path) -> None:
    old = draft.with_suffix(".old")
    if folder.exists():
        # No portable call exchanges two folders: for an instant there is neither, the old one kept aside.
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync_entry(folder.parent)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
