"""Whose turn it is to write a run's checkpoints: ranks of an earlier term, cut off and come back, must not commit.

A term is granted by whoever starts ranks, before it starts them, in the run's folder; its ranks find it in their
environment. Ranks that were started without one (by `torchrun`) have nobody to be confused with.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

TERM = "MUSTER_TERM"
_NAME = "term"


def new() -> str:
    """A name that no other term has."""
    return secrets.token_hex(6)


def own() -> str:
    """Of this rank; empty without one."""
    return os.environ.get(TERM, "")


def grant(folder: Path, term: str) -> None:
    """From now on, only ranks of `term` may commit to the run in `folder`."""
    draft = folder / f"{_NAME}.{term}.partial"
    try:
        draft.write_text(term)
        draft.rename(folder / _NAME)
    except OSError:  # a full disk: rather nobody is kept from committing than everybody
        for path in (draft, folder / _NAME):
            path.unlink(missing_ok=True)


def is_over(folder: Path) -> bool:
    """Whether another term than this rank's has begun."""
    try:
        return bool(own()) and (folder / _NAME).read_text() != own()
    except FileNotFoundError:
        return False
