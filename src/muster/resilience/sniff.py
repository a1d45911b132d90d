"""The sniff test: before a run starts, each rank measures itself for some tenths of a second, beside all others.

A rank whose arithmetic is wrong must not train. A rank that is slow is only told of: machines may be busy.
Speeds are judged against the other ranks of this very moment, never against what hardware should do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist

from muster.errors import TrainingError
from muster.observe.peak import gemm_peak_flops
from muster.parallel.world import World

_PRODUCT_SIZE = 1024
_COPY_BYTES = 32 << 20
_MESSAGE_BYTES = 1 << 20
_REPEATS, _MESSAGE_REPEATS = 3, 20
"""Messages are short, so a busy neighbour would catch all of a few."""
_LEAST_Z = 5.0
_SPREAD = 0.05
"""Least spread that is assumed between healthy ranks, as a share of their median."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """What one rank measured of itself."""

    gemm_flops: float
    copy_bytes_per_s: float
    link_bytes_per_s: float
    """To the better connected of its two neighbours; infinite for a rank without one."""
    latency_s: float
    """Of an all-reduce of one number, which is the slowest rank's on all of them."""


_SAID = {
    "gemm_flops": ("matrix products", 1e9, "GFLOP/s"),
    "copy_bytes_per_s": ("memory copies", 1e9, "GB/s"),
    "link_bytes_per_s": ("messages to its neighbours", 1e6, "MB/s"),
}


def sniff(dtype: torch.dtype, world: World) -> list[Speeds]:
    """The speeds of every rank, all measuring at once; all ranks must call it.

    TrainingError names the ranks whose matrix product was wrong.
    """
    wrong = torch.zeros(world.size)
    wrong[world.rank] = not product_is_right(dtype, world.device)
    faulty = [rank for rank, is_wrong in enumerate(world.sum(*wrong.tolist())) if is_wrong]
    if faulty:
        who = ("rank " if len(faulty) == 1 else "ranks ") + ", ".join(map(str, faulty))
        raise TrainingError(
            f"{who}: a {dtype} product of {_PRODUCT_SIZE}-square matrices came out wrong: leave that machine out, "
            f"its arithmetic or memory is faulty"
        )
    speeds = Speeds(
        gemm_flops=gemm_peak_flops(dtype, world.device),
        copy_bytes_per_s=_copy(world.device),
        link_bytes_per_s=_link(world),
        latency_s=_best(lambda: world.sum(0.0), world.device),
    )
    own = list(astuple(speeds))
    table = [0.0] * (len(own) * world.size)
    table[world.rank * len(own) : (world.rank + 1) * len(own)] = own
    told = world.sum(*table)
    names = [field.name for field in fields(Speeds)]
    return [
        Speeds(**dict(zip(names, told[start : start + len(own)], strict=True)))
        for start in range(0, len(told), len(own))
    ]


def outliers(ranks: Sequence[Speeds]) -> list[str]:
    """A sentence for each figure of a rank that is less than half of the others' median, and far off their spread."""
    found = []
    for name, (what, unit, unit_name) in _SAID.items():
        if name == "link_bytes_per_s" and len(ranks) == 2:
            continue  # both are ends of one link
        values = [getattr(speeds, name) for speeds in ranks]
        for rank, value in enumerate(values):
            others = values[:rank] + values[rank + 1 :]
            if others and _is_low(value, others):
                median = statistics.median(others)
                found.append(
                    f"rank {rank} is slow at {what}: {_figure(value / unit)} {unit_name}, while the other ranks' "
                    f"median is {_figure(median / unit)}; every step will wait for it: look what else runs there"
                )
    return found


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def product_is_right(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a product of matrices of -1 and 1 is exact, by Freivalds' check: (A B) v = A (B v).

    Every sum on the way is a small whole number, so any order of adding them up on any hardware gives the same bits.
    """
    own = torch.Generator(device).manual_seed(0)
    size = (_PRODUCT_SIZE, _PRODUCT_SIZE)
    a, b = (torch.randint(0, 2, size, generator=own, device=device) * 2 - 1 for _ in range(2))
    v = torch.randint(1, 1 << 20, size[:1], generator=own, device=device).double()
    product = torch.mm(a.to(dtype), b.to(dtype)).double()
    return torch.equal(product @ v, a.double() @ (b.double() @ v))


def _is_low(value: float, others: Sequence[float]) -> bool:
    median = statistics.median(others)
    spread = 1.4826 * statistics.median(abs(other - median) for other in others)
    return value < median / 2 and median - value > _LEAST_Z * max(spread, _SPREAD * median)


def _copy(device: torch.device) -> float:
    source = torch.zeros(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _best(lambda: target.copy_(source), device)


def _link(world: World) -> float:
    """Bytes a second, each way, between this rank and the neighbour it reaches faster; ranks talk in pairs."""
    sent = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device=world.device)
    received = torch.empty_like(sent)
    rates = [math.inf] if world.size == 1 else []
    for first in (0, 1):
        peer = world.rank + 1 if world.rank % 2 == first else world.rank - 1
        world.barrier()
        if not 0 <= peer < world.size:
            continue

        def exchange(peer: int = peer) -> None:
            works = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(works):
                work.wait()

        rates.append(_MESSAGE_BYTES / _best(exchange, world.device, _MESSAGE_REPEATS))
    world.barrier()
    return max(rates)


def _best(work: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """Seconds of the fastest of a few calls after a first one."""
    work()
    best = math.inf
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        work()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
