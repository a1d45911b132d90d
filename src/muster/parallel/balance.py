"""Keeping experts' load even while training: what each step tells the layers, and what it learns from them.

The load is that of the global batch: the sum over the ranks that hold different tokens. Knows no loop and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from muster.config import schema
from muster.model.balance import update_bias
from muster.model.moe import MoE


class Balancer:
    """Balances the layers with experts that a rank holds."""

    def __init__(
        self,
        layers: Sequence[MoE],
        how: schema.Balance,
        *,
        groups: Sequence[dist.ProcessGroup],
        averaged: int,
        repeated: int = 1,
    ) -> None:
        """`how` with its defaults filled in (`model.build.balance_from_config`).

        groups: those of the axes along which ranks hold different tokens. averaged: ranks whose gradients are
        averaged, which a loss is multiplied by. repeated: ranks that see the same tokens and whose gradients of
        the router are summed all the same (the tensor axis).
        """
        self._layers, self._how, self._groups = list(layers), how, list(groups)
        self._factor = averaged / repeated

    def begin(self, scale: float) -> None:
        """Before the passes of a step whose gradients are those of the global loss sum times `scale`."""
        for layer in self._layers:
            layer.reset_load()
            layer.aux_scale = (self._how.coefficient or 0.0) * scale * self._factor

    def finish(self) -> Tensor:
        """After them: the tokens that each layer's experts had in this step on all ranks, (layers, X) int64.

        Biases are updated by it.
        """
        load = torch.stack([layer.load for layer in self._layers])
        for group in self._groups:
            dist.all_reduce(load, group=group)
        if self._how.rate is not None:
            for layer, of_layer in zip(self._layers, load, strict=True):
                assert layer.router.bias is not None
                update_bias(layer.router.bias, of_layer, self._how.rate)
        return load


def unevenness(load: Tensor) -> float:
    """The busiest expert's load over the mean, the mean of layers, for load (layers, X); 1 is even."""
    load = load.double()
    return float((load.amax(1) / load.mean(1)).mean())


def sum_counts_over(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """The strategy for `MoE.sum_over_sequence` where sequences are spread over the ranks of `group`.

    It needs no gradient: see `model.balance.sequence_balance_loss`.
    """

    def summed(counts: Tensor) -> Tensor:
        total = counts.clone()
        dist.all_reduce(total, group=group)
        return total

    return summed
