"""PowerSGD: exact where gradients have low rank, equal on all copies, and nothing lost over time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from muster.comm.meter import Meter
from muster.comm.powersgd import Plan, PowerSGD, plan
from muster.comm.traffic import Tally, Traffic
from muster.parallel.world import join

Numbers = np.ndarray[Any, Any]
SHAPES = [(40, 30), (30,), (24, 50), (4, 3)]
ELEMENTS = 40 * 30 + 30 + 24 * 50 + 4 * 3
FIRST, SECOND = 2 * (40 + 24) + 30 + 4 * 3, 2 * (30 + 50)


def test_plan_compresses_what_a_product_shortens() -> None:
    chosen = plan(SHAPES, rank=2)
    assert chosen == Plan(2, ELEMENTS, ((0, 40, 30), (1230, 24, 50)))
    assert chosen.messages == (FIRST, SECOND)
    assert plan([(8, 4, 16)], rank=1).matrices == ((0, 32, 16),), "experts are one matrix of their last dim"
    assert plan([(0, 16), (16, 16)], rank=8).matrices == (), "no shorter, and an empty shard"


def gradient(seed: int, rank: int | None = None) -> Tensor:
    """A flat gradient, whose matrices have this rank."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parts = []
    for shape in SHAPES:
        low = rank is not None and len(shape) == 2
        parts.append(normal(shape[0], rank or 1) @ normal(rank or 1, shape[1]) if low else normal(*shape))
    return torch.cat([part.flatten() for part in parts])


def test_low_rank_is_exact_and_sends_the_factors(run_ranks: Any) -> None:
    exact = (gradient(0, rank=1) + gradient(1, rank=1)) / 2
    answers = run_ranks(2, low_rank)
    for mean, traffic in answers:
        assert np.allclose(mean, exact, atol=1e-5)
        assert np.array_equal(mean, answers[0][0])
        sent = 4 * (FIRST + SECOND)
        assert traffic == {("replicate", "all-reduce"): Tally(2, sent, sent)}


def low_rank() -> tuple[Numbers, Traffic]:
    with join() as world:
        group = dist.group.WORLD
        assert group is not None
        mean = gradient(world.rank, rank=1)  # each copy's of rank 1, so their mean of rank 2
        with Meter({"replicate": group}) as meter:
            PowerSGD(plan(SHAPES, rank=2), group, seed=0)(mean)
        return mean.numpy(), meter.traffic


def test_a_unit_without_matrices_is_averaged_whole(run_ranks: Any) -> None:
    for mean, traffic in run_ranks(2, only_vectors):
        assert np.allclose(mean, np.arange(30) / 2)
        assert traffic == {("replicate", "all-reduce"): Tally(1, 120, 120)}


def only_vectors() -> tuple[Numbers, Traffic]:
    with join() as world:
        group = dist.group.WORLD
        assert group is not None
        mean = torch.arange(30.0) * world.rank
        with Meter({"replicate": group}) as meter:
            PowerSGD(plan([(20,), (10,)], rank=2), group, seed=0)(mean)
        return mean.numpy(), meter.traffic


def test_feedback_makes_up_for_full_rank(run_ranks: Any) -> None:
    exact = (gradient(0) + gradient(1)) / 2
    answers = run_ranks(2, full_rank)
    (after_20, after_80), residuals = answers[0]
    for means, _ in answers:
        assert np.array_equal(means, answers[0][0])
    assert error(after_80, exact) < 0.1
    assert error(after_80, exact) < error(after_20, exact) / 3, "the mean error falls as 1 / steps"
    assert np.allclose(after_80[1200:1230], exact[1200:1230], atol=1e-5), "vectors are exact"
    # What tells the copies apart must not pile up: with feedback against the average it would grow fourfold here.
    assert residuals[1] < 2 * residuals[0]


def error(mean: Numbers, exact: Tensor) -> float:
    return float((torch.from_numpy(mean) - exact).norm() / exact.norm())


def full_rank() -> tuple[Numbers, list[float]]:
    with join() as world:
        group = dist.group.WORLD
        assert group is not None
        reduce = PowerSGD(plan(SHAPES, rank=2), group, seed=0)
        total, means, residuals = torch.zeros(ELEMENTS), [], []
        for step in range(1, 81):
            mean = gradient(world.rank)
            reduce(mean)
            total += mean
            if step in (20, 80):
                means.append((total / step).numpy())
                residuals.append(sum(float(lost.norm()) for lost in reduce._errors))
        assert reduce.residual_bytes == 4 * (40 * 30 + 24 * 50)
        return np.stack(means), residuals
