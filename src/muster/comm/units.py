"""The units in which FSDP2 gathers and reduces, and the shapes in which a rank holds their parameters.

A unit's buffers on the wire are its parameters one after another, each in equal parts: rows
that do not divide are padded, so a rank's part of a parameter always has its padded shape.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from muster.comm.formulas import Unit


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """The FSDP modules of `model`, outermost first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def unit_parameters(unit: FSDPModule) -> list[DTensor]:
    """The parameters that a unit gathers and reduces itself, in the order of its buffers."""
    assert isinstance(unit, nn.Module)
    found: dict[int, DTensor] = {}

    def collect(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            assert isinstance(parameter, DTensor)
            found.setdefault(id(parameter), parameter)
        for child in module.children():
            if not isinstance(child, FSDPModule):
                collect(child)

    collect(unit)
    return list(found.values())


def padded_shard_shape(parameter: DTensor) -> tuple[int, ...]:
    """Shape of this rank's part of a parameter in the buffers: equal along the axis `shard`, which FSDP2 pads, while
    other axes may have divided it unevenly before."""
    mesh, shape = parameter.device_mesh, list(parameter.shape)
    coordinate, names = mesh.get_coordinate(), mesh.mesh_dim_names
    assert coordinate is not None
    assert names is not None
    axes = list(zip(names, mesh.shape, coordinate, parameter.placements, strict=True))
    for axis, size, index, placement in sorted(axes, key=lambda entry: entry[0] == "shard"):
        if isinstance(placement, Replicate):
            continue
        dim = placement.dim  # type: ignore[attr-defined]
        part = -(-shape[dim] // size)
        shape[dim] = part if axis == "shard" else min(max(shape[dim] - index * part, 0), part)
    return tuple(shape)


def zero_units(model: nn.Module) -> list[Unit]:
    """The units of a model whose outermost keeps its parameters between forward and backward, as the formulas see
    them."""
    return [
        Unit(
            shapes=tuple(padded_shard_shape(parameter) for parameter in unit_parameters(unit)),
            regathers=index > 0,
        )
        for index, unit in enumerate(fsdp_units(model))
    ]
