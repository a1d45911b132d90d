"""What one node holds of a run's state in its memory: files like a checkpoint's, in a folder on tmpfs.

    attempt-1764000000000/           so that what several attempts left can never be taken for one state
      step-00000100/                 a generation: as a checkpoint, but with the files that this node holds alone
        rank-00000.safetensors       of its own ranks, and of those whose copies it keeps
        manifest.json                of these files, written when every rank's file and copy is where it should be

A generation is whole where the nodes' manifests together name a file of each rank. After "Gemini: fast failure
recovery in distributed training with in-memory checkpoints" (Wang et al. 2023). Knows no sockets and no tensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from muster.checkpoint import manifest, shelf
from muster.checkpoint.manifest import FileSum, Manifest, write_summed
from muster.errors import CheckpointError

_NAME = re.compile(r"rank-\d{5,}\.safetensors")
_NOTE = ".sum.json"


class Generation(NamedTuple):
    """The state of one step, as the ranks of one attempt had it."""

    attempt: int
    """Milliseconds since 1970 when it began."""
    step: int


class Held:
    """The generations that lie in one folder. Several processes and threads may use it at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def generations(self) -> dict[Generation, Manifest]:
        """Those that were committed, with the sums of the files that are here; oldest first."""
        found = {}
        for generation in sorted(self._committed()):
            with suppress(CheckpointError):  # being removed, or damaged: not here
                found[generation] = manifest.read(self.folder_of(generation))
        return found

    def folder_of(self, generation: Generation) -> Path:
        return shelf.folder_of(self._shelf(generation), generation.step)

    def file_of(self, generation: Generation, name: str) -> Path:
        """CheckpointError where the name is no rank file's."""
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{name} is not the name of a rank's file: nothing of that name is kept")
        return self.folder_of(generation) / name

    def begin(self, generation: Generation) -> Path:
        """A folder for its files. What is older than the newest committed generation makes room."""
        folder = self._partial_of(generation)
        newest = max(self._committed(), default=None)
        self._remove({folder} if newest is None else {folder, self.folder_of(newest)})
        folder.parent.mkdir(exist_ok=True)  # never the root: once that has gone, its owner has
        folder.mkdir(exist_ok=True)
        return folder

    def put(
        self,
        generation: Generation,
        name: str,
        pieces: Iterable[bytes | memoryview],
        said: FileSum | None = None,
    ) -> FileSum:
        """Take in one rank's file; OSError, and nothing is kept of it, where it is not as `said`."""
        path = self.begin(generation) / self.file_of(generation, name).name
        try:
            summed = write_summed(path, pieces)
            if said is not None and summed != said:
                raise OSError(f"{name} did not arrive as it was sent")
        except OSError:
            path.unlink(missing_ok=True)
            raise
        path.with_name(name + _NOTE).write_text(json.dumps(asdict(summed)))
        return summed

    def commit(self, generation: Generation, content: Manifest) -> None:
        """All files of the generation are where they should be: those that are here count from now on."""
        folder = self._partial_of(generation)
        notes = sorted(folder.glob("*" + _NOTE))
        if not notes:
            return
        files = {note.name.removesuffix(_NOTE): FileSum(**json.loads(note.read_bytes())) for note in notes}
        for note in notes:
            note.unlink()
        replace(content, files=files).write(folder)
        shelf.put_in_place(folder, self.folder_of(generation))

    def keep(self, generation: Generation | None) -> None:
        """Remove everything but this."""
        self._remove(set() if generation is None else {self.folder_of(generation)})

    def size_bytes(self) -> int:
        """Memory that all of it takes."""
        sizes = 0
        for path in self.root.glob("*-*/*/*"):
            with suppress(OSError):
                sizes += path.stat().st_size
        return sizes

    def _committed(self) -> set[Generation]:
        return {
            Generation(int(folder.name.removeprefix("attempt-")), step)
            for folder in self.root.glob("attempt-*")
            for step in shelf.steps(folder)
        }

    def _partial_of(self, generation: Generation) -> Path:
        """The same for all who write: ranks of one attempt here, and agents that take in what those of others send."""
        folder = self.folder_of(generation)
        return folder.with_name(folder.name + ".partial")

    def _shelf(self, generation: Generation) -> Path:
        return self.root / f"attempt-{generation.attempt}"

    def _remove(self, stay: set[Path]) -> None:
        for folder in self.root.glob("*-*/step-*"):
            if folder not in stay:
                # Without its manifest nobody takes it for whole, whatever else is left of it.
                with suppress(OSError):
                    (folder / manifest.NAME).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
