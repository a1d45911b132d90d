"""What ranks find in the memory of their nodes when they start: which generation is whole, and its files brought here.

A file that is wrong in one node's memory is taken from another's. Only where a rank's file is nowhere sound is a
generation given up, for an older one or for a checkpoint on disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path

from safetensors import SafetensorError

from muster.checkpoint.manifest import FileSum, Manifest, sum_file
from muster.checkpoint.memory import Generation
from muster.checkpoint.peers import Neighbours, Peer
from muster.checkpoint.state import file_of
from muster.errors import MusterError
from muster.parallel.world import World
from muster.train.plan import Training
from muster.train.replicas import all_say, tell
from muster.train.report import Report
from muster.train.trainee import Trainee

_DEGREES = ("replicate", "shard", "context", "tensor", "pipeline")

Holder = tuple[Peer | None, FileSum]
"""Who has a file, None for this node's own memory, and its sum as they have it."""


class Recollection:
    """One look around in the memory of all nodes."""

    def __init__(self, plan: Training, world: World, report: Report) -> None:
        self._plan, self._world, self._report = plan, world, report
        self._neighbours = None if plan.run.checkpoint.memory == "none" else Neighbours.from_environment()
        self._holders: dict[Generation, dict[str, list[Holder]]] = {}
        self._contents: dict[Generation, Manifest] = {}
        for peer, held in self._look():
            for generation, content in held.items():
                files = self._holders.setdefault(generation, {})
                for name, summed in content.files.items():
                    files.setdefault(name, []).append((peer, summed))
                self._contents.setdefault(generation, content)

    def whole(self) -> list[Generation]:
        """Generations of which some node has each rank's file, oldest first; tells what is missing of a newer one."""
        found, lacking = [], ""
        for generation, files in sorted(self._holders.items(), key=lambda one: one[0].step):
            layout = self._contents[generation].layout
            ranks = prod(int(layout[axis]) for axis in _DEGREES)
            missing = [rank for rank in range(ranks) if file_of(rank) not in files]
            if not missing:
                found.append(generation)
                lacking = ""
            else:
                lacking = (
                    f"step {generation.step} is in memory without the shards of {len(missing)} of {ranks} ranks "
                    f"(rank {missing[0]} first): the nodes that held them are gone, or it was just being written"
                )
        if lacking:
            tell(self._plan, self._world, self._report, "memory-incomplete", lacking)
        return found

    def gather(self, generation: Generation, trainee: Trainee) -> tuple[Path, Manifest | None]:
        """A folder in this node's memory that `trainee` can be restored from, and its manifest; None if it cannot.

        It has the headers of all files, and those files whole, checked byte by byte, that a rank of this node reads.
        All ranks must call.
        """
        assert self._neighbours is not None
        root, attempt = self._neighbours.own.root, self._neighbours.attempt
        folder = root / f"view-{attempt}" / f"step-{generation.attempt}-{generation.step:08d}"
        files, content = self._holders.get(generation, {}), self._contents.get(generation)
        done = content is not None
        if content is not None and os.environ["LOCAL_RANK"] == "0":
            content = replace(content, files={name: holders[0][1] for name, holders in files.items()})
            done = self._lay_out(generation, folder, content)
        if not all_say(self._world, done):
            return folder, None
        sound = set()
        for name in sorted(_read_by(trainee, folder, files)):
            if _claim(folder, name) and not any(
                self._bring(generation, name, holder, folder / name) for holder in files.get(name, [])
            ):
                done = False
            sound.add(name)
        # What was a header alone could have been planned by only if it was as it is in the whole file.
        done = all_say(self._world, done) and _read_by(trainee, folder, files) <= sound
        return folder, content if done else None

    def _lay_out(self, generation: Generation, folder: Path, content: Manifest) -> bool:
        """The files that are here, and of the others their headers."""
        assert self._neighbours is not None
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            content.write(folder)
            for name, holders in self._holders[generation].items():
                peer, _ = holders[0]  # the own node comes first
                if peer is None:
                    os.link(self._neighbours.own.file_of(generation, name), folder / name)
                else:
                    peer.head(generation, name, folder / name)
        except (OSError, MusterError) as error:
            self._damaged(str(error))
            return False
        return True

    def settle(self, generation: Generation | None) -> None:
        """The ranks go on from this one, or from none: all others are of a past that was not. All ranks must call."""
        self._world.barrier()  # all have read
        if self._neighbours is None or not self._world.is_first:
            return
        self._neighbours.own.keep(generation)
        for peer in self._neighbours.others:
            with suppress(OSError):
                peer.keep(generation)

    def _look(self) -> Iterator[tuple[Peer | None, Mapping[Generation, Manifest]]]:
        if self._neighbours is None:
            return
        yield None, self._neighbours.own.generations()
        for peer in self._neighbours.others:
            try:
                yield peer, peer.generations()
            except (OSError, MusterError) as error:
                tell(self._plan, self._world, self._report, "memory-unreachable", f"{peer}: {error}")

    def _bring(self, generation: Generation, name: str, holder: Holder, target: Path) -> bool:
        """Check a file that is here, or get it from where it is in place of its header."""
        assert self._neighbours is not None
        peer, expected = holder
        draft = target.with_suffix(".draft")
        try:
            found = sum_file(target) if peer is None else peer.get(generation, name, draft)
            if found == expected:
                if peer is not None:
                    draft.rename(target)
                return True
            wrong = "does not match its SHA-256 (flipped bits)"
        except (OSError, MusterError) as error:
            wrong = str(error)
        path = self._neighbours.own.file_of(generation, name)
        self._damaged(f"{path if peer is None else f'{name} of {peer}'} {wrong}")
        return False

    def _damaged(self, wrong: str) -> None:
        tell(self._plan, self._world, self._report, "memory-damaged", wrong)


def _read_by(trainee: Trainee, folder: Path, files: Iterable[str]) -> set[str]:
    """What of these files this rank reads; all of them where a damaged header does not let it know."""
    try:
        return trainee.files_of(folder)
    except (MusterError, OSError, SafetensorError):
        return set(files)


def _claim(folder: Path, name: str) -> bool:
    """Whether this is the first rank of the node to ask for it."""
    try:
        (folder / f"{name}.claimed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
