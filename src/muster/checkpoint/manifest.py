"""The manifest of a checkpoint: what it holds and the checksum of every file. Knows files and JSON, no torch."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from muster.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 1
_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Written last, so that its presence says that everything else is complete."""

    format: int
    step: int
    tokens: int
    """Tokens trained on so far; with `seed` and the batches left out it gives the position in the data and every
    random state."""
    seed: int
    digest: str
    """Digest of the resolved run file."""
    identity: dict[str, Any]
    """The part of the run file that a resumed run must share."""
    layout: dict[str, Any]
    model: dict[str, Any]
    """The model's specification."""
    versions: dict[str, str]
    files: dict[str, FileSum]
    guard: dict[str, Any] = field(default_factory=dict)
    """What `resilience/guard.py` remembers: the batches left out, and the steps that spikes are judged by."""

    def write(self, folder: Path) -> None:
        write_synced(folder / NAME, json.dumps(asdict(self), indent=1).encode())


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder; CheckpointError where there is none or it is not one."""
    path = folder / NAME
    try:
        plain = json.loads(path.read_bytes())
        files = {name: FileSum(**entry) for name, entry in plain.pop("files").items()}
        manifest = Manifest(**plain, files=files)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {NAME}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): use an older checkpoint") from None
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.format}, but this version reads {FORMAT}: use the muster that wrote it"
        )
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(
                f"{path} names a file outside its folder ({name}): do not use this checkpoint"
            )
    return manifest


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest; CheckpointError names the first that is not sound."""
    manifest = read(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: use an older checkpoint")
        if path.stat().st_size != expected.bytes:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes instead of {expected.bytes}: use an older checkpoint"
            )
        if sum_file(path) != expected:
            raise CheckpointError(
                f"{path} does not match its SHA-256 (flipped bits): use an older checkpoint"
            )
    return manifest


def sum_file(path: Path) -> FileSum:
    """Size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return FileSum(bytes=size, sha256=digest.hexdigest())


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk (renames are durable only after this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
