"""Whole matrices out of sharded ones: each is brought together on one rank, worked on there, and sent back in parts.

What needs a whole matrix (Muon's orthogonalisation) is shared out among all ranks that hold a part or a copy
of it, so every matrix is gathered once and worked on once. Knows nothing of what is done to a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muster.parallel.sharing import Box, Move, Shape, plan

_BATCH_ELEMENTS = 2**25
"""Elements of whole matrices that a rank holds at a time; more would not fill a device better."""


def batches(tensors: Mapping[str, Tensor]) -> list[Batch]:
    """Cut named tensors, each a matrix (R, C) or a stack of matrices (S, R, C), into batches to work on.

    They may be plain, or DTensors with any placements. Every rank of their meshes must call, with the same names.
    """
    by_mesh: dict[DeviceMesh | None, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        by_mesh.setdefault(mesh, {})[name] = tensor
    found = []
    for mesh, members in by_mesh.items():
        group = None if mesh is None else _group(mesh)
        boxes = _boxes(members, group, mesh)
        for names in _cut(members, ranks=len(boxes)):
            shapes = [_shape(members[name]) for name in names]
            device = members[names[0]].device if mesh is None else torch.device(mesh.device_type)
            found.append(Batch(names, shapes, [[of[name] for name in names] for of in boxes], group, device))
    return found


class Batch:
    """Some tensors of one mesh whose matrices are worked on together."""

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Shape],
        boxes: Sequence[Sequence[Box]],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        rank = 0 if group is None else dist.get_rank(group)
        sharing = plan(shapes, boxes)
        self.names = tuple(names)
        """Names of the tensors."""
        self._device = device
        self._stack_starts = [box.stack.start for box in boxes[rank]]
        self._gather = _Leg(sharing.gather, rank, group)
        self._scatter = _Leg(sharing.scatter, rank, group)
        self._mine: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for matrix, owner in sharing.owners.items():
            if owner == rank:
                self._mine.setdefault(shapes[matrix[0]][1:], []).append(matrix)

    def map_(self, function: Callable[[Tensor], Tensor], shards: Sequence[Tensor]) -> None:
        """Replace this rank's shards, in the order of `names`, by their parts of `function` of the whole matrices.

        `function` gets matrices of one shape, stacked, (N, R, C), and keeps that shape. Every rank must call.
        """
        stacks = [shard if shard.ndim == 3 else shard[None] for shard in shards]
        like = shards[0].new_empty(0, device=self._device)
        batch = {shape: like.new_empty(len(mine), *shape) for shape, mine in self._mine.items()}
        matrices = {
            matrix: batch[shape][place]
            for shape, mine in self._mine.items()
            for place, matrix in enumerate(mine)
        }

        def part(move: Move) -> Tensor:
            return stacks[move.tensor][move.index - self._stack_starts[move.tensor]]

        def whole(move: Move) -> Tensor:
            rows, columns = move.box.rows, move.box.columns
            return matrices[move.tensor, move.index][rows.start : rows.stop, columns.start : columns.stop]

        self._gather.follow(part, whole, like)
        for matrices_of_shape in batch.values():
            matrices_of_shape.copy_(function(matrices_of_shape))
        self._scatter.follow(whole, part, like)


class _Leg:
    """Moves in one direction: copies within this rank, and one all-to-all for the rest."""

    def __init__(self, moves: Sequence[Move], rank: int, group: dist.ProcessGroup | None) -> None:
        self._group = group
        across = [move for move in moves if move.source != move.target]
        self._is_local = not across  # on every rank alike
        self._kept = [move for move in moves if move.source == move.target == rank]
        # Sorting is stable, so both ends of a pair have their moves in the same order.
        self._sent = sorted((m for m in across if m.source == rank), key=lambda move: move.target)
        self._received = sorted((m for m in across if m.target == rank), key=lambda move: move.source)
        ranks = range(1 if group is None else dist.get_world_size(group))
        ranks = range(1 if group is None else dist.get_world_size(group))
        self._sent_to = [sum(m.box.elements for m in self._sent if m.target == rank) for rank in ranks]
        self._received_from = [
            sum(m.box.elements for m in self._received if m.source == rank) for rank in ranks
        ]

    def follow(self, read: Callable[[Move], Tensor], write: Callable[[Move], Tensor], like: Tensor) -> None:
        """Move what `read` gives to where `write` says, through buffers of the kind of `like`."""
        for move in self._kept:
            write(move).copy_(read(move))
        if self._is_local:
            return
        outgoing, incoming = like.new_empty(sum(self._sent_to)), like.new_empty(sum(self._received_from))
        for move, piece in _pieces(self._sent, outgoing):
            piece.copy_(read(move))
        dist.all_to_all_single(incoming, outgoing, self._received_from, self._sent_to, group=self._group)
        for move, piece in _pieces(self._received, incoming):
            write(move).copy_(piece)


def _pieces(moves: Sequence[Move], buffer: Tensor) -> Iterator[tuple[Move, Tensor]]:
    """Each move with its place in a flat buffer, as rows and columns."""
    sizes = [move.box.elements for move in moves]
    for move, piece in zip(moves, torch.split(buffer, sizes), strict=True):
        yield move, piece.view(len(move.box.rows), len(move.box.columns))


def _boxes(
    tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None, mesh: DeviceMesh | None
) -> list[dict[str, Box]]:
    """Every rank's part of every tensor: each tells its own, so that no kind of sharding need be known here."""
    if group is None or mesh is None:
        return [{name: Box(*map(range, _shape(tensor))) for name, tensor in tensors.items()}]
    own = torch.tensor(_own_chunks(tensors), device=mesh.device_type)  # (tensors, offset and size, 3)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    return [
        {
            name: Box(*(range(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)))
            for name, (offsets, sizes) in zip(tensors, of, strict=True)
        }
        for of in (rank.tolist() for rank in every)
    ]


def _own_chunks(tensors: Mapping[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Offsets and sizes of this rank's part of each tensor, in its stack, as DCP's planner knows them."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors))
    chunks = {}
    for item in planner.create_local_plan().items:
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        chunks[item.index.fqn] = ([0, *chunk.offsets][-3:], [1, *chunk.sizes][-3:])
    return [chunks[name] for name in tensors]


def _cut(tensors: Mapping[str, Tensor], ranks: int) -> Iterator[list[str]]:
    """Consecutive names whose matrices keep every rank busy and fit beside the model."""
    names: list[str] = []
    elements = matrices = 0
    for name, tensor in tensors.items():
        names.append(name)
        elements, matrices = elements + tensor.numel(), matrices + _shape(tensor)[0]
        if elements >= ranks * _BATCH_ELEMENTS and matrices >= ranks:
            yield names
            names, elements, matrices = [], 0, 0
    if names:
        yield names


def _group(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """One group of all ranks of a mesh."""
    if mesh.size() == 1:
        return None
    if mesh.ndim == 1:
        return mesh.get_group()
    # Only its members call: other meshes (other pipeline stages) make theirs at times of their own.
    group: dist.ProcessGroup = dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    return group


def _shape(tensor: Tensor) -> Shape:
    stack, rows, columns = [1, *tensor.shape][-3:]
    return stack, rows, columns
