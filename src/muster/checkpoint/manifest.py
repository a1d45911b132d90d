"""The manifest of a checkpoint: what it holds and the checksum of every file. Knows files and JSON, no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from muster.checkpoint.sealed import SEAL, seal, unseal
from muster.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 2
"""1: without a checksum of the manifest itself; still read."""
_READ_BYTES = 1 << 20


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
    held_out_loss: float | None = None
    """Nats per token, where this very state was evaluated during training."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What `resilience/guard.py` remembers: the batches left out, and the steps that spikes are judged by."""

    def write(self, folder: Path) -> None:
        write_synced(folder / NAME, self.sealed())

    def sealed(self) -> bytes:
        """As it is written, for `parse`."""
        return seal(json.loads(json.dumps(asdict(self))))  # as it reads back


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder; CheckpointError where there is none or a byte of it is wrong."""
    path = folder / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {NAME}") from None
    except OSError as error:
        raise CheckpointError(f"{path} is damaged ({error}): use an older checkpoint") from None
    return parse(content, str(path))


def parse(content: bytes, path: str) -> Manifest:
    """A manifest as it was written; CheckpointError, which names `path`, where a byte of it is wrong."""
    try:
        plain = json.loads(content)
        if plain["format"] != 1 or SEAL in plain:
            plain = unseal(content)
        files = {name: FileSum(**entry) for name, entry in plain.pop("files").items()}
        manifest = Manifest(**plain, files=files)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): use an older checkpoint") from None
    if manifest.format not in (1, FORMAT):
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
    for problem in problems(folder, manifest):
        raise CheckpointError(f"{problem}: use an older checkpoint")
    return manifest


def problems(folder: Path, manifest: Manifest, *, part: int = 0, parts: int = 1) -> Iterator[str]:
    """What is wrong with the files, each named, as it is found; with `parts`, only one part of them is read."""
    for name, expected in list(manifest.files.items())[part::parts]:
        path = folder / name
        if not path.is_file():
            yield f"{path} is missing"
            continue
        try:
            found = sum_file(path)
        except OSError as error:
            yield f"{path} cannot be read ({error.strerror})"
            continue
        if found == expected:
            continue
        owner = next((other for other, theirs in manifest.files.items() if theirs == found), None)
        if owner is not None:
            yield f"{path} holds what {owner} should (the files were exchanged)"
        elif found.bytes != expected.bytes:
            yield f"{path} has {found.bytes} bytes instead of {expected.bytes}"
        else:
            yield f"{path} does not match its SHA-256 (flipped bits)"
    if part == 0:
        # A reader takes all safetensors files of a folder as its shards, so one too many is as bad as a wrong one.
        for path in strangers(folder, manifest):
            if path.suffix == ".safetensors":
                yield f"{path} is not in the manifest"


def strangers(folder: Path, manifest: Manifest) -> list[Path]:
    """What lies in the folder and is not named by the manifest."""
    return sorted(path for path in folder.iterdir() if path.name not in {*manifest.files, NAME})


def sum_file(path: Path) -> FileSum:
    """Size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return FileSum(bytes=size, sha256=digest.hexdigest())


def write_summed(path: Path, pieces: Iterable[bytes | memoryview]) -> FileSum:
    """Write a file piece by piece, wait until it is on disk, and return its sum, for which no byte is read again."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in pieces:
            whole = view = memoryview(piece).cast("B")
            while len(view):
                view = view[os.write(descriptor, view) :]
            _begin_writeback(descriptor, size, len(whole))
            digest.update(whole)
            size += len(whole)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileSum(bytes=size, sha256=digest.hexdigest())


def _begin_writeback(descriptor: int, start: int, count: int) -> None:
    """Have the kernel begin to write what was just handed to it, so that the disk works while the next piece is hashed
    and little is left to wait for at the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    write_summed(path, [content])


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk (renames are durable only after this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
