"""The meter sees every collective that torch issues, and what FSDP2 issues is what the formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from muster.comm.choice import Choice
from muster.comm.formulas import zero_traffic
from muster.comm.meter import OTHER, Meter
from muster.comm.traffic import Tally, Traffic
from muster.comm.units import zero_units
from muster.model.transformer import Transformer, initial_value
from muster.parallel import data
from muster.parallel.apply import apply
from muster.parallel.layout import Layout
from muster.parallel.mesh import Mesh
from muster.parallel.world import join
from tests.comm.toy import SPEC


def test_each_kind_of_collective(run_ranks: Any) -> None:
    first, second = run_ranks(2, every_kind)
    assert first["world", "all-reduce"] == Tally(1, 40, 40)
    assert first["world", "all-gather"] == Tally(3, 24 + 24 + 16, 12 + 12 + 8)
    assert first["world", "reduce-scatter"] == Tally(1, 24, 12)
    assert first["world", "broadcast"] == Tally(1, 40, 40)
    for traffic in (first, second):
        # Even, uneven (6 of 8 rows stay), a list, and forward and backward under autograd.
        assert traffic["world", "all-to-all"] == Tally(5, 32 + 8 + 24 + 2 * 32, 16 + 2 + 12 + 2 * 16)
    assert first["world", "send"] == Tally(2, 20 + 40, 20 + 40), "a batched exchange and a plain send"
    assert second["world", "send"] == Tally(1, 20, 20), "the receiver of a send counts nothing"


def every_kind() -> Traffic:
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    scatter = (
        dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    )
    with join() as world:
        me = world.rank
        with Meter({"world": dist.group.WORLD}) as meter:  # type: ignore[dict-item]
            ten = torch.zeros(10)
            dist.all_reduce(ten)
            dist.broadcast(ten, 0)
            gather(torch.zeros(6), torch.zeros(3))
            dist.all_gather([torch.zeros(3), torch.zeros(3)], torch.zeros(3))
            gather(torch.zeros(8, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16))
            scatter(torch.zeros(3), torch.zeros(6))
            dist.all_to_all_single(torch.zeros(8), torch.zeros(8))
            splits = [6, 2] if me == 0 else [2, 6]
            eight = torch.zeros(8, dtype=torch.int8)
            dist.all_to_all_single(eight, eight.clone(), splits, splits)
            dist.all_to_all([torch.zeros(3), torch.zeros(3)], [torch.zeros(3), torch.zeros(3)])
            rows = torch.zeros(8, requires_grad=True)
            functional.all_to_all_single_autograd(rows, [4, 4], [4, 4], dist.group.WORLD).sum().backward()
            pair = [
                dist.P2POp(dist.isend, torch.zeros(5), 1 - me),
                dist.P2POp(dist.irecv, torch.zeros(5), 1 - me),
            ]
            for work in dist.batch_isend_irecv(pair):
                work.wait()
            dist.send(ten, 1) if me == 0 else dist.recv(ten, 0)
            dist.barrier()
        return meter.traffic


def test_axes_are_told_apart_through_dtensor_and_fsdp(run_ranks: Any) -> None:
    for traffic in run_ranks(4, tensor_and_shard):
        assert traffic["shard", "all-gather"].payload_bytes == 2 * 2 * 32 * 4, (
            "2 linears, forward and backward"
        )
        assert traffic["shard", "reduce-scatter"].payload_bytes == 2 * 32 * 4
        assert traffic["tensor", "all-reduce"] == Tally(1, 3 * 8 * 4, 3 * 8 * 4)
        assert traffic[OTHER, "all-reduce"] == Tally(1, 4, 6), "the default group was not named"


def tensor_and_shard() -> Traffic:
    with join():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        for layer in (*model, model):
            fully_shard(layer, mesh=mesh["shard"])
        with Meter({axis: mesh.get_group(axis) for axis in ("shard", "tensor")}) as meter:
            model(torch.ones(3, 8)).sum().backward()
            dist.all_reduce(torch.zeros(1))
        return meter.traffic


def test_units_know_parts_that_the_tensor_axis_divided_unevenly(run_ranks: Any) -> None:
    rows = []
    for elements, payload in run_ranks(4, uneven):
        assert payload == elements * 2 * 4
        rows.append(elements // 8)
    assert rows == [2, 1, 2, 1], (
        "5 rows are 3 and 2 over the tensor axis, halves of which are padded to 2 and 1"
    )


def uneven() -> tuple[int, int]:
    with join():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        model = torch.nn.Linear(8, 5, bias=False)
        parallelize_module(model, mesh["tensor"], ColwiseParallel())
        fully_shard(model, mesh=mesh["shard"])
        with Meter({axis: mesh.get_group(axis) for axis in ("shard", "tensor")}) as meter:
            (model(torch.ones(3, 8)) * 1.0).sum().backward()
        return zero_units(model)[0].elements, meter.traffic["shard", "reduce-scatter"].payload_bytes


LAYOUTS = [
    {"replicate": replicate, "shard": shard, "zero": zero}
    for replicate, shard, zero in [
        *((n, 1, 0) for n in (2, 4)),
        *((1, n, zero) for n in (2, 4) for zero in (1, 2, 3)),
        *((2, 2, zero) for zero in (1, 3)),
    ]
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_zero_sends_what_the_formulas_say(ranks: int, run_ranks: Any) -> None:
    pairs = run_ranks(
        ranks, measured_and_expected, [degrees for degrees in LAYOUTS if _world(degrees) == ranks]
    )[0]
    assert len(pairs) >= 2 * 4
    for measured, expected in pairs:
        assert measured == expected


def _world(degrees: dict[str, int]) -> int:
    return degrees["replicate"] * degrees["shard"]


def measured_and_expected(layouts: list[dict[str, Any]]) -> list[tuple[Traffic, Traffic]]:
    with join() as world:
        return [
            _pair(
                Layout(**degrees, recompute="none", microbatch=1, accumulate=3, reason=""),
                compute,
                world.device,
            )
            for degrees in layouts
            for compute in (torch.float32, torch.bfloat16)
        ]


def _pair(layout: Layout, compute: torch.dtype, device: torch.device) -> tuple[Traffic, Traffic]:
    mesh = Mesh(layout, device)
    with torch.device("meta"):
        model = Transformer(SPEC)
    apply(model, mesh, compute=compute, value=lambda name, shape: initial_value(name, shape, SPEC, 0))
    tokens = torch.zeros((1, SPEC.context), dtype=torch.int64)
    with Meter(mesh.groups) as meter:
        for index in range(layout.accumulate):
            data.begin_microbatch(model, layout, is_last=index == layout.accumulate - 1)
            model(tokens, tokens).backward()
    return meter.traffic, zero_traffic(
        zero_units(model),
        zero=layout.zero,
        shard=layout.shard,
        replicate=layout.replicate,
        microbatches=layout.accumulate,
        parameter_bytes=compute.itemsize,
        choice=Choice(),
    )
