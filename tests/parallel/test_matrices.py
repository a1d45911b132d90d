"""A function of whole matrices gives every shard what it gives one process, however the matrices are spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

SHAPES = {"wide": (6, 9), "tall": (11, 4), "short": (2, 8), "experts": (5, 4, 6), "again": (6, 9)}


def running_sum(matrices: Tensor) -> Tensor:
    """Exact in fp32 for small whole numbers, and every entry depends on all those before it."""
    return matrices.flatten(1).cumsum(1).view_as(matrices)


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(-9, 9, shape, generator=generator).float() for name, shape in SHAPES.items()}


def mismatches(mesh_shape: tuple[int, ...], dims: tuple[int | None, ...]) -> list[str]:
    """Names of the tensors, sharded on `dims` by mesh axis, whose shards differ from the whole's result."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from muster.parallel.matrices import batches
    from muster.parallel.world import join

    with join():
        mesh = init_device_mesh("cpu", mesh_shape)
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        spread = {
            name: distribute_tensor(whole, mesh, placements, src_data_rank=None)
            for name, whole in values().items()
        }
        for batch in batches(spread):
            batch.map_(running_sum, [spread[name].to_local() for name in batch.names])
        wrong = []
        for name, tensor in values().items():
            expected = running_sum(tensor if tensor.ndim == 3 else tensor[None]).view_as(tensor)
            if not torch.equal(spread[name].full_tensor(), expected):
                wrong.append(name)
        return wrong


@pytest.mark.parametrize(
    ("mesh_shape", "dims"),
    [
        ((2,), (0,)),
        ((2,), (1,)),
        ((3,), (0,)),
        ((4,), (0,)),
        ((2,), (None,)),
        ((2, 2), (None, 0)),
        ((2, 2), (0, 0)),
        ((2, 2), (0, 1)),
        ((2, 1), (None, 0)),
    ],
    ids=str,
)
def test_every_spread(mesh_shape: tuple[int, ...], dims: tuple[int | None, ...], run_ranks: Any) -> None:
    ranks = torch.Size(mesh_shape).numel()
    assert run_ranks(ranks, mismatches, mesh_shape, dims) == [[]] * ranks


def test_meshes_side_by_side(run_ranks: Any) -> None:
    """As in a pipeline: two meshes of two axes, each of half of the ranks, with tensors of their own."""
    assert run_ranks(8, mismatches_by_stage) == [True] * 8


def mismatches_by_stage() -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from muster.parallel.matrices import batches
    from muster.parallel.world import join

    with join() as world:
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pipeline", "shard", "tensor"))
        stage = mesh["shard", "tensor"]
        whole = torch.arange(20.0).view(4, 5) + world.rank // 4
        spread = distribute_tensor(whole, stage, [Shard(0), Shard(1)], src_data_rank=None)
        (batch,) = batches({"w": spread})
        batch.map_(running_sum, [spread.to_local()])
        return torch.equal(spread.full_tensor(), running_sum(whole[None])[0])


def test_plain_tensors_need_no_ranks() -> None:
    from muster.parallel.matrices import batches

    tensors = values()
    for batch in batches(tensors):
        batch.map_(running_sum, [tensors[name] for name in batch.names])
    assert torch.equal(tensors["experts"], running_sum(values()["experts"]))
    assert torch.equal(tensors["wide"], running_sum(values()["wide"][None])[0])


def test_batches_are_cut_so_that_little_is_whole_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from muster.parallel import matrices

    monkeypatch.setattr(matrices, "_BATCH_ELEMENTS", 60)
    names = [batch.names for batch in matrices.batches(values())]
    assert names == [("wide", "tall"), ("short", "experts"), ("again",)]
