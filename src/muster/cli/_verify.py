"""Every byte of a run, a checkpoint or an export against the checksums that were written with it. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muster.checkpoint import manifest, shelf
from muster.checkpoint.sealed import SEAL, unseal
from muster.errors import CheckpointError


def damage(folder: Path) -> list[str]:
    """What is not as it was written, a sentence a file. Records of a run (*.jsonl, logs) carry no checksums."""
    if (folder / "run.json").is_file():
        return list(_run(folder))
    if (folder / manifest.NAME).is_file():
        return list(_checkpoint(folder))
    return list(_export(folder))


def _run(folder: Path) -> Iterator[str]:
    record = folder / "run.json"
    plain, problem = _sealed(record)
    if problem:
        yield f"{record} is damaged ({problem}): delete it, `muster train` writes it again"
    for name, expected in plain.get("files", {}).items():
        yield from _compare(folder / name, expected, "`muster train` writes it again")
    kept = folder / "checkpoints"
    for step in shelf.steps(kept):
        yield from _checkpoint(shelf.folder_of(kept, step))
    if (folder / "hf" / "muster.json").is_file():
        yield from _export(folder / "hf")


def _checkpoint(folder: Path) -> Iterator[str]:
    try:
        content = manifest.read(folder)
    except CheckpointError as error:
        yield str(error)
        return
    yield from (f"{problem}: use an older checkpoint" for problem in manifest.problems(folder, content))
    for path in manifest.strangers(folder, content):
        if path.suffix != ".safetensors":  # which is among the problems
            yield f"{path} is not in the manifest: nothing reads it, remove it"


def _export(folder: Path) -> Iterator[str]:
    record = folder / "muster.json"
    plain, problem = _sealed(record)
    if problem:
        yield f"{record} is damaged ({problem}): export the run again"
        return
    sums = plain.get("sha256")
    if not isinstance(sums, dict) or not sums:
        yield f"{record} is damaged (no checksums): export the run again"
        return
    for name, expected in sums.items():
        if Path(name).name != name:
            yield f"{record} names a file outside its folder ({name})"
        else:
            yield from _compare(folder / name, expected, "export the run again")


def _compare(path: Path, expected: str, then: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing: {then}"
    elif manifest.sum_file(path).sha256 != expected:
        yield f"{path} does not match its SHA-256 (flipped bits): {then}"


def _sealed(path: Path) -> tuple[dict[str, Any], str | None]:
    """A record and what is wrong with it; one that was written without a seal has nothing to be checked by."""
    try:
        content = path.read_bytes()
        plain = json.loads(content)
        if not isinstance(plain, dict):
            return {}, "it holds no JSON object"
        return (unseal(content) if SEAL in plain else plain), None
    except (OSError, ValueError, RecursionError) as error:
        return {}, str(error)
