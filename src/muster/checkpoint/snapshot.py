"""One rank's shards of one step as the bytes of its safetensors file, in host memory that is used again and again.

`arrange` decides where each shard lies in the file, `Snapshot` keeps a copy in that arrangement: what
is written to disk, sent to a peer or read back is one block of bytes behind one header. The header
carries each shard's offsets in the undivided tensor (DCP's Hugging Face convention).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import DTensor, Replicate

State = Mapping[str, Tensor]
"""Tensors by name; a DTensor stands for one rank's shard of the whole."""

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT_BYTES = 8
_PIECE_BYTES = 1 << 24
"""Written and hashed at a time. The interpreter's lock is taken in between, so pieces are not small (measured: 1 MB
pieces slow steps of small operations more)."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor or this rank's part of it, and its place behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """Of its first element in the undivided tensor."""
    start: int
    """In bytes."""

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The shards that one rank owns, in the order of its file."""

    shards: tuple[Shard, ...]

    @property
    def size_bytes(self) -> int:
        """Without the header."""
        return sum(shard.size_bytes for shard in self.shards)

    def header(self) -> bytes:
        """What a safetensors file begins with."""
        offsets = {shard.name: {"saved_offsets": shard.offsets} for shard in self.shards}
        entries = {"__metadata__": {"DCP_SHARDING_INFO": json.dumps(offsets)}} | {
            shard.name: {
                "dtype": _DTYPES[shard.dtype],
                "shape": shard.shape,
                "data_offsets": [shard.start, shard.start + shard.size_bytes],
            }
            for shard in self.shards
        }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        return struct.pack("<Q", len(text)) + text


def header_bytes(first: bytes) -> int:
    """How long the header of a safetensors file is that begins with these eight bytes."""
    return len(first) + int(struct.unpack("<Q", first)[0])


def arrange(state: State, *, owns_whole: bool) -> Arrangement:
    """The shards of `state` that this rank owns, as DCP's save planner lists them; sends nothing.

    `owns_whole`: whether it is the one to keep tensors that are not divided.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({name: tensor for name, tensor in state.items() if _owns(tensor, owns_whole)})
    found = []
    for item in planner.create_local_plan().items:
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        dtype = item.tensor_data.properties.dtype
        found.append(Shard(item.index.fqn, dtype, tuple(chunk.sizes), tuple(chunk.offsets), 0))
    # Wide types first, so that every tensor is aligned, as the format's own library does it.
    found.sort(key=lambda shard: (-shard.dtype.itemsize, shard.name))
    shards, start = [], 0
    for shard in found:
        shards.append(Shard(shard.name, shard.dtype, shard.shape, shard.offsets, start))
        start += shard.size_bytes
    return Arrangement(tuple(shards))


def stream(state: State, arrangement: Arrangement) -> Iterator[memoryview]:
    """The bytes of the file straight from the tensors, holding at most one of them beside."""
    yield memoryview(arrangement.header())
    for shard in arrangement.shards:
        yield from _pieces(local(state[shard.name]).detach().cpu().contiguous())


class Snapshot:
    """A copy of the shards that this rank owns, of one step.

    Its memory is claimed once, and pinned where shards are on a GPU."""

    step: int | None = None
    """Updates that the copied state has seen; None before the first copy."""

    def __init__(self, state: State, *, owns_whole: bool) -> None:
        self.arrangement = arrange(state, owns_whole=owns_whole)
        devices = {local(state[shard.name]).device for shard in self.arrangement.shards}
        self._gpu = next((device for device in devices if device.type == "cuda"), None)
        # Filled, so that the pages are there before the first save needs them.
        self.body = torch.zeros(
            self.arrangement.size_bytes, dtype=torch.uint8, pin_memory=self._gpu is not None
        )
        self._views = {
            shard.name: self.body[shard.start : shard.start + shard.size_bytes]
            .view(shard.dtype)
            .view(shard.shape)
            for shard in self.arrangement.shards
        }

    @torch.no_grad()
    def take(self, state: State, step: int) -> None:
        """Copy the state after `step` updates over the last copy; it is whole when this returns.

        In any thread, while another one reads the state."""
        for name, view in self._views.items():
            view.copy_(local(state[name]), non_blocking=True)
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        self.step = step

    def tensors(self) -> dict[str, Tensor]:
        """The copies by name: views of `body`, each of its shard's shape."""
        return dict(self._views)

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of the rank's file."""
        yield memoryview(self.arrangement.header())
        yield from _pieces(self.body)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    for start in range(0, len(content), _PIECE_BYTES):
        yield content[start : start + _PIECE_BYTES]


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
