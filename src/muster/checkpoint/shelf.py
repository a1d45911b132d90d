"""The shelf: the folder of one run's checkpoints. Which exist, which is the newest sound one, which may go.

Pure file work; which tensors a checkpoint holds is `state.py`'s business.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from muster.checkpoint import manifest
from muster.checkpoint.manifest import Manifest
from muster.errors import CheckpointError
from muster.observe import term

_STEP = re.compile(r"step-(\d{8,})")
_PARTIAL, _FORMER = ".partial", ".former"


def folder_of(shelf: Path, step: int) -> Path:
    return shelf / f"step-{step:08d}"


def partial_of(shelf: Path, step: int) -> Path:
    """Of this rank's own term, so that ranks that should have ended do not write among those that have begun."""
    of_term = f".{term.own()}" if term.own() else ""
    return shelf / f"step-{step:08d}{of_term}{_PARTIAL}"


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
        raise none_sound(shelf, len(candidates))
    return None


def none_sound(shelf: Path, count: int) -> CheckpointError:
    return CheckpointError(
        f"none of the {count} checkpoints in {shelf} is sound: restore one from a backup, or delete "
        f"the folder to start over"
    )


def begin(shelf: Path, step: int) -> Path:
    """An empty `.partial` folder for the ranks to write into."""
    if not shelf.is_dir():
        shelf.mkdir(parents=True)
        manifest.sync_folder(shelf.parent)
    partial = partial_of(shelf, step)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    return partial


def commit(shelf: Path, step: int, content: Manifest) -> Path:
    """Turn a complete `.partial` folder into a checkpoint: manifest last, sync, rename, sync the parent.

    One of the same step (a damaged one, or one that training went back from) makes way, and is not deleted before the
    new one stands in its place. CheckpointError where others have been started in place of these ranks.
    """
    partial = partial_of(shelf, step)
    content.write(partial)
    if term.is_over(shelf.parent):
        raise CheckpointError(
            f"step {step} is not committed: these ranks were cut off, and others have been started in their place"
        )
    return put_in_place(partial, folder_of(shelf, step))


def put_in_place(partial: Path, final: Path) -> Path:
    """Give a complete folder its name; one that has it already stays until the new one stands there."""
    former = final.with_name(final.name + _FORMER)
    manifest.sync_folder(partial)
    if final.exists():
        if former.exists():
            shutil.rmtree(former)
        os.rename(final, former)
    try:
        os.rename(partial, final)
    except OSError:
        if former.exists():
            os.rename(former, final)
        raise
    manifest.sync_folder(final.parent)
    if former.exists():
        shutil.rmtree(former)
    return final


def abandon(shelf: Path, step: int) -> None:
    """Remove what a failed save left."""
    shutil.rmtree(partial_of(shelf, step), ignore_errors=True)


def kept(shelved: Iterable[int], keep: int, *, every: int | None = None, best: int | None = None) -> set[int]:
    """Which of the shelved steps stay: the `keep` newest, the `best` one, and of each `every` steps the first.

    With `every` 1000 that is the first at or after 1000, 2000, ...: saves come by the clock and may be put off,
    so few are at a multiple itself.
    """
    ordered = sorted(shelved)
    stay = {step for step in ordered if step == best} | set(ordered[-keep:])
    if every is not None:
        first: dict[int, int] = {}
        for step in ordered:
            first.setdefault(step // every, step)
        stay |= {step for bucket, step in first.items() if bucket > 0}
    return stay


def best(shelf: Path, among: Iterable[int]) -> tuple[int, float] | None:
    """Of these checkpoints, as far as they were evaluated, the one with the lowest held-out loss, and that loss."""
    losses = []
    for step in among:
        with contextlib.suppress(CheckpointError):  # a damaged one is nobody's best
            loss = manifest.read(folder_of(shelf, step)).held_out_loss
            if loss is not None:
                losses.append((loss, step))
    return (min(losses)[1], min(losses)[0]) if losses else None


def retain(
    shelf: Path, keep: int, *, saved: int | None = None, every: int | None = None, keep_best: bool = False
) -> None:
    """Delete all checkpoints but those that are to be kept (`kept`).

    Those after `saved`, the step of the newest save, go too: training has gone back from them, because they are
    damaged or because it was told to, and they must not push out the ones that it goes on from.
    """
    shelved = steps(shelf)
    valid = [step for step in shelved if saved is None or step <= saved]
    found = best(shelf, valid) if keep_best else None
    stay = kept(valid, keep, every=every, best=found[0] if found else None)
    for step in shelved:
        if step not in stay:
            doomed = folder_of(shelf, step)
            # Without its manifest it is no checkpoint any more, so a kill half-way leaves no half of one.
            (doomed / manifest.NAME).unlink(missing_ok=True)
            shutil.rmtree(doomed)


def sweep(shelf: Path) -> None:
    """Remove what a killed save or clean-up left behind; call it before the ranks write."""
    if not shelf.is_dir():
        return
    for entry in sorted(shelf.iterdir()):
        if entry.name.endswith(_FORMER):
            final = entry.with_name(entry.name.removesuffix(_FORMER))
            if not final.exists():  # killed between making way and standing in its place
                os.rename(entry, final)
            else:
                shutil.rmtree(entry)
        elif entry.name.endswith(_PARTIAL) or (
            _STEP.fullmatch(entry.name) is not None and not (entry / manifest.NAME).exists()
        ):
            shutil.rmtree(entry)


def _former_of(shelf: Path, step: int) -> Path:
    return shelf / f"step-{step:08d}{_FORMER}"
