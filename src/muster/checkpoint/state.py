"""Tensors of a run to and from a checkpoint, at any world size and ZeRO stage.

Each rank writes the shards it owns into one safetensors file (`snapshot.py`); DCP's load planner
reads whatever slices the loading layout needs. Neither direction sends anything between ranks,
so nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan

from muster.checkpoint.manifest import FileSum, write_summed
from muster.checkpoint.snapshot import State, arrange, local, stream
from muster.errors import CheckpointError, DoesNotFit

WEIGHTS = "weights."
"""Prefix of the names of model parameters in a checkpoint."""


def write_shards(state: State, folder: Path, rank: int, *, owns_whole: bool) -> None:
    """Write the shards of `state` that this rank owns, and beside them their size and checksum.

    `owns_whole`: whether it is the one to write tensors that are not divided.
    """
    arrangement = arrange(state, owns_whole=owns_whole)
    write_file(stream(state, arrangement), arrangement.size_bytes, folder, rank)


def write_file(pieces: Iterable[bytes | memoryview], size: int, folder: Path, rank: int) -> None:
    """Write a rank's file of about `size` bytes and the note of its sum; DoesNotFit where the disk refuses.

    What was refused is removed, and why is left in a note for the first rank (`refusals`).
    """
    path = folder / file_of(rank)
    try:
        summed = write_summed(path, pieces)
        _note(folder, rank).write_text(
            json.dumps(asdict(summed))
        )  # soon part of the manifest, which is synced
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        refusal = refused(size, folder, error)
        with contextlib.suppress(OSError):  # there is room for a sentence now, if the folder is there at all
            _refusal(folder, rank).write_text(str(refusal))
        raise refusal from error


def refused(size: int, folder: Path, error: OSError) -> DoesNotFit:
    """`size` bytes of checkpoint that the disk did not take, as a sentence."""
    with contextlib.suppress(OSError):
        free = f", which has {shutil.disk_usage(folder).free / 1e6:.0f} MB free"
        return DoesNotFit(
            f"cannot write {size / 1e6:.0f} MB of checkpoint to {folder}{free} ({error.strerror or error}): "
            f"free some space, or lower checkpoint.keep"
        )
    return DoesNotFit(f"cannot write a checkpoint to {folder} ({error.strerror or error}): look at that disk")


def refusals(folder: Path) -> list[str]:
    """Why ranks could not write, as far as they could say so."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("*.refused")):
            if said := path.read_text():  # there was room for that
                found.append(said)
    return found


def collect_sums(folder: Path, world_size: int) -> dict[str, FileSum]:
    """What the ranks wrote, by file name; removes the notes that `write_shards` left."""
    sums = {}
    for rank in range(world_size):
        note = _note(folder, rank)
        sums[file_of(rank)] = FileSum(**json.loads(note.read_bytes()))
        note.unlink()
    return sums


def read_shards(state: State, folder: Path) -> None:
    """Fill the tensors of `state` in place from a checkpoint of any layout, each rank reading its own part."""
    with _told_of(folder):
        reader = HuggingFaceStorageReader(str(folder))
        planner, plan = _plan(state, _metadata(reader))
        reader.read_data(plan, planner)


def open_shards(folder: Path) -> Callable[[str, torch.Size], Tensor]:
    """Reads model parameters of a checkpoint of any layout one at a time, whole, in fp32, by name and shape."""
    with _told_of(folder):
        reader = HuggingFaceStorageReader(str(folder))
        metadata = _metadata(reader)

    def read(name: str, shape: torch.Size) -> Tensor:
        state = {WEIGHTS + name: torch.empty(shape)}
        with _told_of(folder):
            planner, plan = _plan(state, metadata)
            reader.read_data(plan, planner)
        return state[WEIGHTS + name]

    return read


def files_needed(state: State, folder: Path) -> set[str]:
    """Names of the files that `read_shards` would read; of the others, headers alone need to be there."""
    with _told_of(folder):
        reader = HuggingFaceStorageReader(str(folder))
        _, plan = _plan(state, _metadata(reader))
        return {Path(reader.storage_data[item.storage_index].relative_path).name for item in plan.items}


def _metadata(reader: HuggingFaceStorageReader) -> Metadata:
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    return metadata


def _plan(state: State, metadata: Metadata) -> tuple[DefaultLoadPlanner, LoadPlan]:
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(state), metadata, is_coordinator=True)
    plan = planner.create_local_plan()
    covered = Counter[str]()
    for item in plan.items:
        covered[item.dest_index.fqn] += prod(item.lengths)
    for name, tensor in state.items():
        if covered[name] < local(tensor).numel():  # of which torch says nothing
            raise ValueError(f"it lacks a part of {name}")
    return planner, plan


@contextlib.contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} does not hold the state of this model: {error}") from error


def file_of(rank: int) -> str:
    """Name of a rank's file in the folder of a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def _note(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.sum.json"


def _refusal(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.refused"
