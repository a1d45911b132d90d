"""Muon (Jordan et al. 2024) for the matrices of the blocks, and AdamW for everything else.

The momentum of a matrix is orthogonalised before it is applied: all directions of the update get about
the same size. Scaled as in Moonlight (Liu et al. 2025), an update is as large as AdamW's. A whole
matrix is needed for that; `parallel/matrices.py` brings it together where it is sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from muster.config import schema
from muster.parallel.matrices import batches
from muster.train.adamw import AdamW
from muster.train.moments import Parameters

_MOMENTUM = 0.95
_ADAMW_RMS = 0.2
"""Root mean square of an AdamW update, over the learning rate, that Moonlight measured."""


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """True for what Muon is made for: a block's matrices, stacks of experts' (X, F, E) included, but no router."""
    return name.startswith("layers.") and parameter.ndim >= 2 and ".router." not in name


class Muon:
    """`rest` is the optimizer of the other parameters; `compute` the precision of the orthogonalisation."""

    def __init__(
        self, matrices: Parameters, rest: AdamW, config: schema.Optimizer, compute: torch.dtype
    ) -> None:
        self._matrices, self._rest, self._compute = matrices, rest, compute
        self._decay = config.weight_decay
        self._beta = _MOMENTUM if config.momentum is None else config.momentum
        self._momentum = {name: torch.zeros_like(parameter) for name, parameter in matrices.items()}
        self._batches = batches(matrices)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients at rate `lr` and drop them."""
        self._rest.step(lr)
        for batch in self._batches:
            updates = [self._direction(name) for name in batch.names]
            batch.map_(orthogonalize, updates)
            for name, update in zip(batch.names, updates, strict=True):
                self._apply(name, update, lr)

    def state(self) -> dict[str, Tensor]:
        """`momentum.layers.0.mlp.up.weight`, ... beside AdamW's `exp_avg.embed.weight`, ..."""
        return {f"momentum.{name}": tensor for name, tensor in self._momentum.items()} | self._rest.state()

    def set_steps(self, steps: int) -> None:
        """Set the number of updates done, which AdamW needs."""
        self._rest.set_steps(steps)

    def _direction(self, name: str) -> Tensor:
        """This rank's shard of the momentum after the gradient is taken in, looked ahead as Nesterov does."""
        parameter = self._matrices[name]
        assert parameter.grad is not None
        gradient, momentum = _local(parameter.grad), _local(self._momentum[name])
        momentum.lerp_(gradient, 1 - self._beta)
        direction = gradient.lerp(momentum, self._beta).to(self._compute)
        parameter.grad = None
        return direction

    def _apply(self, name: str, update: Tensor, lr: float) -> None:
        parameter = self._matrices[name]
        scale = _ADAMW_RMS * max(parameter.shape[-2:]) ** 0.5
        _local(parameter).mul_(1 - lr * self._decay).add_(update, alpha=-lr * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (N, R, C) near 1, within about 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration with the coefficients of Jordan et al. 2024, which grow small
    singular values fast and do not converge.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (
        matrices.mT if is_tall else matrices
    )  # the smaller dim first: x x^T is the smaller of the two products
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
