"""The mesh: one world of ranks seen along named axes, and the process groups that follow from it.

Ranks are numbered with the tensor axis innermost, so that those that talk most are neighbours:

    rank = (((pipeline x replicate + replicate) x shard + shard) x context + context) x tensor + tensor

Two views of the same ranks serve parameters. Dense ones are sharded over shard x context (a context rank holds the
same parameters as its peers, so it can share in ZeRO); experts are divided over the `expert` axis first,
which is taken out of shard x context, and the rest of it shards what each expert rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from muster.parallel.layout import Layout
from muster.parallel.world import World

Group = dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's index on every axis."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int

    @classmethod
    def of(cls, rank: int, layout: Layout) -> Place:
        rank, tensor = divmod(rank, layout.tensor)
        rank, context = divmod(rank, layout.context)
        rank, shard = divmod(rank, layout.shard)
        pipeline, replicate = divmod(rank, layout.replicate)
        return cls(pipeline, replicate, shard, context, tensor)


class Mesh:
    """A rank's view of the axes. Axes of size 1 cost nothing: they have no process group."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.place = Place.of(dist.get_rank(), layout)
        self._world = init_device_mesh(device.type, (layout.world,), mesh_dim_names=("world",))
        shard = layout.shard * layout.context
        self._dense = self._view(shard, 1)
        # A view of its own, because the same ranks are grouped in another way.
        self._sparse = self._view(shard // layout.expert, layout.expert) if layout.expert > 1 else self._dense

    @property
    def data_index(self) -> int:
        """Which part of the global batch this rank reads, 0 <= index < layout.data."""
        return self.place.replicate * self.layout.shard + self.place.shard

    @property
    def reads_first(self) -> bool:
        """True on one of the ranks that read the same part of the batch."""
        place = self.place
        return place.pipeline == place.context == place.tensor == 0

    @property
    def is_first_of_stage(self) -> bool:
        """True on one of the ranks that hold the same layers."""
        place = self.place
        is_first = place.shard == place.context == place.tensor == 0
        return is_first and (place.replicate == 0 or self.layout.is_local)

    @property
    def copies_apart(self) -> int:
        """Copies of the gradients among the ranks of `together` that FSDP2 does not know of."""
        if self.layout.is_local or not self._takes_over_copies:
            return 1
        return self._dense["replicate"].size()

    @property
    def is_first_copy(self) -> bool:
        """False where FSDP2 does not know that another rank holds the same parameters and is before this one."""
        return not self._takes_over_copies or self.groups["replicate"].rank() == 0

    @cached_property
    def together(self) -> World:
        """The ranks that take a step together: all, or those of one copy where copies take steps of their own."""
        if not self.layout.is_local:
            return World(dist.get_rank(), self.layout.world, self.device)
        own = self.place.replicate
        ranks = [rank for rank in range(self.layout.world) if Place.of(rank, self.layout).replicate == own]
        group = dist.new_group(ranks, use_local_synchronization=True) if len(ranks) > 1 else None
        return World(ranks.index(dist.get_rank()), len(ranks), self.device, group)

    @property
    def counts_loss(self) -> bool:
        """False where another rank of the tensor axis holds the same loss."""
        return self.place.tensor == 0

    def copies_group(self) -> Group:
        """The same place in each copy (`replicate`), as a group that nobody else uses, so that an exchange in the
        background is not in the way; each call makes one."""
        ranks = dist.get_process_group_ranks(self.groups["replicate"])
        group: Group = dist.new_group(ranks, use_local_synchronization=True)
        return group

    def dense_data(self) -> DeviceMesh:
        """(replicate, shard) or (shard,): over what FSDP2 shards and reduces ordinary parameters."""
        return self._data(self._dense)

    def expert_data(self) -> DeviceMesh:
        """The same for the parameters of experts, each expert rank holding different ones."""
        return self._data(self._sparse)

    def tensor(self) -> DeviceMesh:
        return self._dense["tensor"]

    def expert(self) -> DeviceMesh:
        """(expert,), or (expert, tensor) where matrices are divided as well."""
        return self._sparse["expert", "tensor"] if self.layout.tensor > 1 else self._sparse["expert"]

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The process group of each axis with more than one rank that this rank communicates along."""
        found: dict[str, Group] = {}
        for axis, size in _axes(self._dense):
            if size > 1:
                found[axis] = self._dense.get_group(axis)
        if self._sparse is not self._dense:
            # Each view has groups of its own: these are what FSDP2 uses for experts.
            for axis, size in _axes(self._sparse):
                if size > 1 and axis in ("shard", "replicate"):
                    found[f"expert {axis}"] = self._sparse.get_group(axis)
            found["expert"] = self._sparse.get_group("expert")
        if self.layout.context > 1:
            found["context"] = self._context_group()
        return found

    def _view(self, shard: int, expert: int) -> DeviceMesh:
        layout = self.layout
        replicate = layout.replicate
        if layout.zero == 0:
            replicate, shard = replicate * shard, 1
        sizes = {
            "pipeline": layout.pipeline,
            "replicate": replicate,
            "shard": shard,
            "expert": expert,
            "tensor": layout.tensor,
        }
        # FSDP2 wants a shard axis even where it has one rank; each other one would make groups for nothing.
        kept = {axis: size for axis, size in sizes.items() if size > 1 or axis == "shard"}
        # Where the expert axis is the whole world, torch would give it the group that shards already go through;
        # tokens on their way to experts would then queue behind the gathering of parameters.
        backends = {"expert": dist.get_backend_config()} if "expert" in kept else None
        # Private, because torch has no public way to name two groupings of the same ranks: FSDP2 takes a
        # parameter that is already divided only if both meshes have one root.
        return self._world._unflatten(0, tuple(kept.values()), tuple(kept), backends)  # type: ignore[arg-type]

    def _data(self, view: DeviceMesh) -> DeviceMesh:
        replicated = "replicate" in (view.mesh_dim_names or ())
        return view["replicate", "shard"] if replicated and not self._takes_over_copies else view["shard"]

    @property
    def _takes_over_copies(self) -> bool:
        """Whether FSDP2 does not see that there are copies, because their reduction is ours."""
        replicated = "replicate" in (self._dense.mesh_dim_names or ())
        return replicated and (self.layout.compress.takes_over_copies or self.layout.sync is not None)

    def _context_group(self) -> Group:
        stride, size = self.layout.tensor, self.layout.context
        starts = (start for start in range(self.layout.world) if start // stride % size == 0)
        members = [list(range(start, start + stride * size, stride)) for start in starts]
        own: Group = dist.new_subgroups_by_enumeration(members)[0]  # type: ignore[no-untyped-call]
        return own


def _axes(view: DeviceMesh) -> Iterator[tuple[str, int]]:
    return zip(view.mesh_dim_names or (), view.shape, strict=True)
