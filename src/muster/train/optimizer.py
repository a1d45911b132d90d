"""AdamW over sharded parameters: fused, with the state flattened to named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from muster.config import schema

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Decoupled weight decay on matrices only; state exists from the start, so that loading is filling.

    Wraps `torch.optim.AdamW(fused=True)`: one kernel reads and writes each parameter once.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], config: schema.Optimizer) -> None:
        self._named = dict(named)
        matrices = [p for p in self._named.values() if p.ndim >= 2]
        vectors = [p for p in self._named.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.torch = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for parameter in self._named.values():
            self.torch.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }

    def step(self, lr: float) -> None:
        """Apply the gradients at rate `lr` and drop them."""
        for group in self.torch.param_groups:
            group["lr"] = lr
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """First and second moments by name: `exp_avg.layers.0.mlp.up.weight`, ..."""
        return {
            f"{moment}.{name}": self.torch.state[parameter][moment]
            for moment in _MOMENTS
            for name, parameter in self._named.items()
        }

    def set_steps(self, steps: int) -> None:
        """Set the number of updates done, which the bias correction needs."""
        for state in self.torch.state.values():
            state["step"].fill_(float(steps))
