"""AdamW over sharded parameters (Loshchilov & Hutter 2019): fused, one unit of the model at a time.

Where the moments live - in memory or in a file - is the moment store's business (`moments.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from muster.config import schema
from muster.train.moments import MomentStore, Parameters

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """Decoupled weight decay on matrices only.

    Wraps `torch.optim.AdamW(fused=True)`: one kernel reads and writes each parameter once. A unit is
    a block, or one of the parameters around the blocks; its gradients are dropped as soon as it is updated.
    """

    def __init__(self, named: Parameters, config: schema.Optimizer, store: MomentStore) -> None:
        self._store = store
        units = _units(named)
        self._state = store.zeros(units, _MOMENTS)
        self._units = {unit: self._optimizer(members, config) for unit, members in units.items()}

    def step(self, lr: float) -> None:
        """Apply the gradients at rate `lr` and drop them."""
        for unit, optimizer in self._units.items():
            for group in optimizer.param_groups:
                group["lr"] = lr
            with self._store.loaded(unit):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """First and second moments by name: `exp_avg.layers.0.mlp.up.weight`, ..."""
        return dict(self._state)

    def set_steps(self, steps: int) -> None:
        """Set the number of updates done, which the bias correction needs."""
        for optimizer in self._units.values():
            for state in optimizer.state.values():
                state["step"].fill_(float(steps))

    def _optimizer(self, members: Parameters, config: schema.Optimizer) -> torch.optim.AdamW:
        matrices = [p for p in members.values() if p.ndim >= 2]
        vectors = [p for p in members.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for name, parameter in members.items():
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{moment: self._state[f"{moment}.{name}"] for moment in _MOMENTS},
            }
        return optimizer


def _units(named: Parameters) -> Mapping[str, Parameters]:
    """Parameters by unit, in the model's order: `layers.0`, `layers.1`, ... and `embed.weight`, `norm.weight`, ..."""
    units: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in named.items():
        units.setdefault(".".join(name.split(".")[:2]), {})[name] = parameter
    return units
