"""Tensors of a run to and from a checkpoint, at any world size and ZeRO stage.

Each rank writes the shards it owns, as DCP's save planner lists them, into one safetensors
file whose header carries the offsets; DCP's load planner reads whatever slices the loading
layout needs. Neither direction sends anything between ranks, so nothing is ever pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Replicate

from muster.checkpoint.manifest import FileSum, sum_file, write_synced
from muster.errors import CheckpointError, DoesNotFit

State = Mapping[str, Tensor]
"""Tensors by name; a DTensor stands for one rank's shard of the whole."""

WEIGHTS = "weights."
"""Prefix of the names of model parameters in a checkpoint."""


def write_shards(state: State, folder: Path, rank: int, *, owns_whole: bool) -> None:
    """Write the shards of `state` that this rank owns, and beside them their size and checksum.

    `owns_whole`: whether it is the one to write tensors that are not divided.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({name: tensor for name, tensor in state.items() if _owns(tensor, owns_whole)})
    tensors: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for item in planner.create_local_plan().items:
        assert item.tensor_data is not None
        shard = planner.resolve_data(item)
        assert isinstance(shard, Tensor)
        tensors[item.index.fqn] = shard.detach().cpu().contiguous()
        offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
    path = folder / f"rank-{rank:05d}.safetensors"
    try:
        save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        write_synced(_sum_path(folder, rank), json.dumps(asdict(sum_file(path))).encode())
    except (OSError, SafetensorError) as error:  # the library words a full disk as an error of its own
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise DoesNotFit(
            f"cannot write {size / 1e6:.0f} MB of checkpoint to {folder} ({error}): free some space, "
            f"or lower checkpoint.keep"
        ) from error


def collect_sums(folder: Path, world_size: int) -> dict[str, FileSum]:
    """What the ranks wrote, by file name; removes the notes that `write_shards` left."""
    sums = {}
    for rank in range(world_size):
        note = _sum_path(folder, rank)
        sums[f"rank-{rank:05d}.safetensors"] = FileSum(**json.loads(note.read_bytes()))
        note.unlink()
    return sums


def read_shards(state: State, folder: Path) -> None:
    """Fill the tensors of `state` in place from a checkpoint of any layout, each rank reading its own part."""
    reader, planner = HuggingFaceStorageReader(str(folder)), DefaultLoadPlanner(flatten_state_dict=False)
    try:
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        planner.set_up_planner(dict(state), metadata, is_coordinator=True)
        reader.read_data(planner.create_local_plan(), planner)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} does not hold the state of this model: {error}") from error


def _owns(tensor: Tensor, owns_whole: bool) -> bool:
    """Of copies, the first writes: a DTensor's owner is first on every axis that replicates it."""
    if not isinstance(tensor, DTensor):
        return owns_whole
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        index == 0
        for index, placement in zip(coordinate, tensor.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def _sum_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.sum.json"
