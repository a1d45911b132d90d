"""int8 collectives against exact ones, and error feedback: what rounding takes, later steps give back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from muster.comm.int8 import Int8AllGather, Int8AllReduce, Int8ReduceScatter
from muster.comm.meter import Meter
from muster.comm.quantize import encoded_bytes
from muster.comm.traffic import Tally, Traffic
from muster.parallel.world import join

RANKS, CHUNK, STEPS = 4, 700, 40


Numbers = np.ndarray[Any, Any]


def contribution(rank: int) -> Tensor:
    return torch.randn(RANKS * CHUNK, generator=torch.Generator().manual_seed(rank))


def exact_sum() -> Tensor:
    return torch.stack([contribution(rank) for rank in range(RANKS)]).double().sum(0)


def rounding() -> float:
    """An element's largest error when each rank's contribution is rounded once."""
    return sum(float(contribution(rank).abs().max()) for rank in range(RANKS)) / 254


def test_reduce_scatter_rounds_each_gradient_once_and_its_mean_error_vanishes(run_ranks: Any) -> None:
    for rank, (*numbers, traffic) in enumerate(run_ranks(RANKS, scattered)):
        sums, averages = map(torch.from_numpy, numbers)
        exact = exact_sum()[rank * CHUNK : (rank + 1) * CHUNK]
        assert float((sums[0] - exact).abs().max()) <= rounding()
        assert float((sums[0] - exact).abs().max()) > 0
        over_steps = sums.double().mean(0)
        # Error feedback: the sum over steps lacks one step's rounding, whatever the number of steps.
        assert float((over_steps - exact).abs().max()) <= 1.02 * rounding() / STEPS
        assert torch.allclose(averages * RANKS, sums[0], atol=1e-6)
        payload = RANKS * encoded_bytes(CHUNK)
        assert traffic == {("shard", "all-to-all"): Tally(1, payload, payload * 3 // 4)}
        assert payload < 0.26 * RANKS * CHUNK * 4


def scattered() -> tuple[Numbers, Numbers, Traffic]:
    with join() as world:
        group = dist.group.WORLD
        assert group is not None
        reduce = Int8ReduceScatter()
        sums = torch.empty(STEPS, CHUNK)
        for out in sums:
            reduce(out, contribution(world.rank), group, dist.ReduceOp.SUM)
        assert reduce.residual_bytes == RANKS * CHUNK * 4
        reduce.forget()
        average = torch.empty(CHUNK)
        with Meter({"shard": group}) as meter:
            reduce(average, contribution(world.rank), group, dist.ReduceOp.AVG)
        return sums.numpy(), average.numpy(), meter.traffic


def test_all_reduce_leaves_equal_bits_everywhere_and_its_mean_error_vanishes(run_ranks: Any) -> None:
    answers = run_ranks(RANKS, averaged)
    exact = exact_sum()[:-1] / RANKS
    twice = 2.1 * rounding() / RANKS
    for numbers, traffic in answers:
        assert np.array_equal(numbers, answers[0][0])
        means = torch.from_numpy(numbers)
        assert float((means[0] - exact).abs().max()) <= twice
        assert float((means.double().mean(0) - exact).abs().max()) <= 1.02 * twice / STEPS
        payload = RANKS * encoded_bytes(CHUNK)
        assert traffic == {
            ("replicate", "all-to-all"): Tally(1, payload, payload * 3 // 4),
            ("replicate", "all-gather"): Tally(1, payload, payload * 3 // 4),
        }


def averaged() -> tuple[Numbers, Traffic]:
    with join() as world:
        group = dist.group.WORLD
        assert group is not None
        reduce = Int8AllReduce(group)
        means = torch.stack([contribution(world.rank)[:-1]] * STEPS)  # a size that ranks do not divide
        with Meter({"replicate": group}) as meter:
            reduce(means[0])
        for mean in means[1:]:
            reduce(mean)
        return means.numpy(), meter.traffic


def test_all_gather_gives_every_rank_the_same_parameters(run_ranks: Any) -> None:
    answers = run_ranks(RANKS, gathered)
    exact = torch.stack([contribution(rank)[:CHUNK] for rank in range(RANKS)])
    for numbers, traffic in answers:
        assert np.array_equal(numbers, answers[0][0])
        assert (
            float((torch.from_numpy(numbers).view(RANKS, CHUNK) - exact).abs().max()) <= 4.5 / 254 + 4.5 / 128
        )
        payload = RANKS * encoded_bytes(CHUNK)
        assert traffic == {("shard", "all-gather"): Tally(1, payload, payload * 3 // 4)}
        assert payload < 0.51 * RANKS * CHUNK * 2


def gathered() -> tuple[Numbers, Traffic]:
    with join() as world:
        group = dist.group.WORLD
        assert group is not None
        gather = Int8AllGather()
        whole = gather.allocate((RANKS * CHUNK,), dtype=torch.bfloat16, device=world.device)
        mine = whole[world.rank * CHUNK : (world.rank + 1) * CHUNK]  # FSDP2 hands in a part of the output
        mine.copy_(contribution(world.rank)[:CHUNK])
        with Meter({"shard": group}) as meter:
            gather(whole, mine, group)
        return whole.float().numpy(), meter.traffic
