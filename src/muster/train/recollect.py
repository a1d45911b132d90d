"""What ranks find in the memory of their nodes when they start: which generation is whole, and its files brought here.

A file that is wrong in one node's memory is taken from another's. Only where a rank's file is nowhere sound is a
generation given up, for an older one or for a checkpoint on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path

from muster.checkpoint.manifest import FileSum, Manifest, sum_file
from muster.checkpoint.memory import Generation
from muster.checkpoint.peers import Neighbours, Peer
from muster.checkpoint.state import file_of
from muster.errors import MusterError
from muster.parallel.world import World
from muster.train.plan import Training
from muster.train.replicas import tell
from muster.train.report import Report

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

    def gather(self, generation: Generation) -> tuple[Path, Manifest | None]:
        """All its files in one folder of this node's memory, checked byte by byte, and the manifest of them all; None
        where one cannot be had.

        All ranks of a node must call: each brings its part.
        """
        assert self._neighbours is not None
        files = self._holders.get(generation, {})
        folder = self._neighbours.own.root / f"view-{self._neighbours.attempt}" / self._view(generation)
        folder.mkdir(parents=True, exist_ok=True)
        rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        for name in sorted(files)[rank::ranks]:
            if not any(self._bring(generation, name, holder, folder / name) for holder in files[name]):
                return folder, None
        content = self._contents.get(generation)
        sums = {name: holders[0][1] for name, holders in files.items()}
        return folder, None if content is None else replace(content, files=sums)

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
        assert self._neighbours is not None
        peer, expected = holder
        source: object = peer
        try:
            target.unlink(missing_ok=True)
            if peer is None:
                source = path = self._neighbours.own.file_of(generation, name)
                os.link(path, target)
                found = sum_file(target)
            else:
                found = peer.get(generation, name, target)
        except (OSError, MusterError) as error:
            wrong = str(error)
        else:
            if found == expected:
                return True
            wrong = f"{name} does not match its SHA-256 (flipped bits)"
        tell(self._plan, self._world, self._report, "memory-damaged", f"{source}: {wrong}")
        return False

    def _view(self, generation: Generation) -> str:
        return f"step-{generation.attempt}-{generation.step:08d}"
