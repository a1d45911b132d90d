"""The shelf: the folder of one run's checkpoints. Which exist, which is the newest sound one, which may go.

Pure file work; which tensors a checkpoint holds is `state.py`'s business.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from muster.checkpoint import manifest
from muster.checkpoint.manifest import Manifest
from muster.errors import CheckpointError

_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"


def folder_of(shelf: Path, step: int) -> Path:
    return shelf / f"step-{step:08d}"


def partial_of(shelf: Path, step: int) -> Path:
    return shelf / f"step-{step:08d}{_PARTIAL}"


def steps(shelf: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first; says nothing about their soundness."""
    if not shelf.is_dir():
        return []
    found = (_STEP.fullmatch(entry.name) for entry in shelf.iterdir())
    return sorted(int(match[1]) for match in found if match)


def newest_sound(shelf: Path, on_damaged: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose every file matches its checksum; what is wrong with newer ones is reported.

    None where there is no checkpoint at all. CheckpointError where all are damaged: starting
    over silently would throw the run away.
    """
    candidates = steps(shelf)
    for step in reversed(candidates):
        folder = folder_of(shelf, step)
        try:
            return folder, manifest.verify(folder)
        except CheckpointError as error:
            on_damaged(str(error))
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {shelf} is sound: restore one from a backup, or delete "
            f"the folder to start over"
        )
    return None


def commit(shelf: Path, step: int, content: Manifest) -> Path:
    """Turn a complete `.partial` folder into a checkpoint: manifest last, sync, rename, sync the parent."""
    partial, final = partial_of(shelf, step), folder_of(shelf, step)
    content.write(partial)
    manifest.sync_folder(partial)
    if final.exists():
        # Only a damaged checkpoint is written again (a sound one would have been resumed from).
        shutil.rmtree(final)
    os.rename(partial, final)
    manifest.sync_folder(shelf)
    return final


def retain(shelf: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints."""
    for step in steps(shelf)[:-keep]:
        doomed = folder_of(shelf, step)
        # Without its manifest it is no checkpoint any more, so a kill half-way leaves no half of one.
        (doomed / manifest.NAME).unlink(missing_ok=True)
        shutil.rmtree(doomed)


def sweep(shelf: Path) -> None:
    """Remove what a killed save or clean-up left behind; call it before the ranks write."""
    if not shelf.is_dir():
        return
    for entry in shelf.iterdir():
        stale = entry.name.endswith(_PARTIAL)
        stripped = _STEP.fullmatch(entry.name) is not None and not (entry / manifest.NAME).exists()
        if stale or stripped:
            shutil.rmtree(entry)
