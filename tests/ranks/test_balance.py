"""Balancing on ranks equals balancing in one process: loads, biases, and the auxiliary loss of split sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muster.config.schema import Balance
from muster.model.moe import MoE
from muster.parallel.balance import Balancer, sum_counts_over, unevenness
from muster.parallel.world import join
from tests.conftest import RunRanks
from tests.ranks.test_expert import ROWS, TOKENS, assert_equal, batch, gradients, layer

TOKENS_IN_ALL = ROWS * TOKENS


def steps(moe: MoE, how: Balance, x: Tensor, groups: list[Any], averaged: int) -> list[Any]:
    balancer = Balancer([moe], how, groups=groups, averaged=averaged)
    loads = []
    for _ in range(3):
        balancer.begin(1 / TOKENS_IN_ALL)
        moe(x)
        loads.append(balancer.finish())
    assert moe.router.bias is not None
    return [torch.cat(loads).tolist(), moe.router.bias.tolist()]


def on_two_ranks(how: Balance) -> list[Any]:
    with join() as world:
        half = slice(world.rank * ROWS // 2, (world.rank + 1) * ROWS // 2)
        return steps(layer("uneven"), how, batch()[0][half], [dist.group.WORLD], 2)


@pytest.mark.parametrize("how", [Balance(kind="bias", rate=0.05), Balance(kind="aux_loss", coefficient=0.1)])
def test_loads_and_biases_are_those_of_the_global_batch(run_ranks: RunRanks, how: Balance) -> None:
    expected = steps(layer("uneven"), how, batch()[0], [], 1)
    assert run_ranks(2, on_two_ranks, how) == [expected, expected]
    loads, bias = expected
    assert sum(loads[0]) == TOKENS_IN_ALL * 2
    assert any(bias) == (how.kind == "bias")


def router_gradient(moe: MoE, x: Tensor, averaged: int) -> dict[str, Tensor]:
    Balancer([moe], Balance(kind="aux_loss", coefficient=0.3), groups=[], averaged=averaged).begin(0.5)
    out = moe(x)
    out.backward(torch.zeros_like(out))
    return {"router": gradients(moe)["router.weight"] / averaged}


def half_of_each_sequence() -> Any:
    with join() as world:
        moe = layer("uneven")
        assert dist.group.WORLD is not None
        moe.sum_over_sequence = sum_counts_over(dist.group.WORLD)
        own = slice(world.rank * TOKENS // 2, (world.rank + 1) * TOKENS // 2)
        gradient = router_gradient(moe, batch()[0][:, own], 2)["router"]
        dist.all_reduce(gradient)
        return gradient.numpy()


def test_auxiliary_loss_of_sequences_that_are_spread_over_ranks(run_ranks: RunRanks) -> None:
    expected = router_gradient(layer("uneven"), batch()[0], 1)
    assert bool(expected["router"].any())
    for found in run_ranks(2, half_of_each_sequence):
        assert_equal({"router": torch.from_numpy(found)}, expected)


def test_unevenness() -> None:
    assert unevenness(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0]])) == 2.5
