"""The traffic meter: counts the collectives that torch really issues, by mesh axis.

It listens to torch's dispatcher, where every collective passes whoever asked for it: FSDP2,
DTensor, a pipeline schedule or our own code, forward or backward, on gloo or NCCL. While it
listens, every operation takes a detour of some microseconds through Python, so it is for
single steps; a step's traffic repeats unless experts move. (The flight recorder costs less
but does not do: under gloo it names a reduce-scatter an all-reduce and omits sends.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# Documented as the way to see every operation, under this name only.
from torch.utils._python_dispatch import TorchDispatchMode

from muster.comm.collectives import group_of
from muster.comm.traffic import Kind, Traffic

OTHER = "other"
"""The axis of groups that the meter was not told of."""


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Use as a context manager around a step; `traffic` is what this rank took part in.

    `groups` names the process group of each axis; another group of the same ranks counts as the same axis (two
    views of a mesh have a group each). An axis that spans the world may use the default group, and is
    then charged for what is summed over the world.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traffic = Traffic()
        self._by_name = {group.group_name: axis for axis, group in groups.items()}
        self._by_ranks = {_ranks(group): axis for axis, group in groups.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor translates it into collectives on plain tensors, which come by here again
        if isinstance(func, torch._ops.OpOverload) and func.namespace in (
            "c10d",
            "_c10d_functional",
            "_dtensor",
            "muster",
        ):
            self._record(func, args)
        return func(*args, **(kwargs or {}))

    def _axis(self, group: dist.ProcessGroup) -> str:
        return self._by_name.get(group.group_name) or self._by_ranks.get(_ranks(group), OTHER)

    def _record(self, func: torch._ops.OpOverload, args: tuple[Any, ...]) -> None:
        name = func._schema.name
        if name in _SILENT:
            return
        if name not in _COLLECTIVES:
            raise NotImplementedError(f"the traffic meter does not know {name}: add it to its table")
        kind, whole_bytes = _COLLECTIVES[name]
        group = _group(args)
        payload = whole_bytes(args, group)
        kept = _kept_bytes(args, payload, group) if kind == "all-to-all" else None
        self.traffic.count(self._axis(group), kind, payload, group.size(), kept_bytes=kept)


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    """The group among a collective's arguments: an object in torch.distributed, a name in functional collectives."""
    for arg in args:
        if isinstance(arg, dist.ProcessGroup):
            return arg
        if isinstance(arg, torch.ScriptObject) and arg._type().name() == "ProcessGroup":  # type: ignore[attr-defined]
            return dist.ProcessGroup.unbox(arg)
    return group_of(next(arg for arg in reversed(args) if isinstance(arg, str)))


def _bytes(value: Any) -> int:
    """Bytes of a tensor, or of tensors in lists of any depth."""
    return value.nbytes if isinstance(value, Tensor) else sum(_bytes(item) for item in value)


def _kept_bytes(args: tuple[Any, ...], payload: int, group: dist.ProcessGroup) -> int:
    """What an all-to-all leaves on its own rank: one of a list, the split that the call gives, or an equal part."""
    me = group.rank()
    if isinstance(args[1], list) and isinstance(args[1][0], Tensor):
        return args[1][me].nbytes  # type: ignore[no-any-return]
    splits = [arg for arg in args if isinstance(arg, list)]  # of the output, then of the input
    if not splits or not splits[1]:
        return payload // group.size()
    rows = sum(splits[1])
    return payload * splits[1][me] // rows if rows else 0


_Payload = Callable[[tuple[Any, ...], dist.ProcessGroup], int]


def _argument(index: int) -> _Payload:
    return lambda args, _group: _bytes(args[index])


def _part(index: int) -> _Payload:
    return lambda args, group: _bytes(args[index]) * group.size()


_COLLECTIVES: dict[str, tuple[Kind, _Payload]] = {
    "c10d::allreduce_": ("all-reduce", _argument(0)),
    "c10d::allreduce_coalesced_": ("all-reduce", _argument(0)),
    "c10d::allgather_": ("all-gather", _argument(0)),
    "c10d::_allgather_base_": ("all-gather", _argument(0)),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", _argument(0)),
    "c10d::reduce_scatter_": ("reduce-scatter", _argument(1)),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", _argument(1)),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", _argument(1)),
    "c10d::alltoall_": ("all-to-all", _argument(1)),
    "c10d::alltoall_base_": ("all-to-all", _argument(1)),
    "c10d::broadcast_": ("broadcast", _argument(0)),
    "c10d::send": ("send", _argument(0)),
    "_c10d_functional::all_reduce": ("all-reduce", _argument(0)),
    "_c10d_functional::all_reduce_": ("all-reduce", _argument(0)),
    "_c10d_functional::all_reduce_coalesced": ("all-reduce", _argument(0)),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", _part(0)),
    "_c10d_functional::all_gather_into_tensor_out": ("all-gather", _part(0)),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all-gather", _part(0)),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", _argument(0)),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce-scatter", _argument(0)),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce-scatter", _argument(0)),
    "_c10d_functional::all_to_all_single": ("all-to-all", _argument(0)),
    "_c10d_functional::broadcast": ("broadcast", _argument(0)),
    "_dtensor::shard_dim_alltoall": ("all-to-all", _argument(0)),
    "muster::all_gather": ("all-gather", _argument(0)),
    "muster::reduce_scatter": ("reduce-scatter", _argument(1)),
}
_SILENT = {
    "c10d::recv_",
    "c10d::recv_any_source_",
    "c10d::barrier",
    "c10d::monitored_barrier_",
    "c10d::check_for_nan",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
}
