"""What an optimizer is to the training loop, and the choice of one by the run file.

Knows parameters by name and nothing else of the model; how they are sharded is theirs to say (DTensors).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from muster.config import schema
from muster.train.adamw import AdamW
from muster.train.moments import InMemory, Mapped, Parameters
from muster.train.muon import Muon, is_hidden_matrix


class Optimizer(Protocol):
    """Updates a model from its gradients. State exists from the start, so that loading is filling."""

    def step(self, lr: float) -> None:
        """Apply the gradients at rate `lr` and drop them."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: `exp_avg.layers.0.mlp.up.weight`, ...; shards of this rank."""

    def set_steps(self, steps: int) -> None:
        """Set the number of updates done, after the tensors of `state` were filled from a checkpoint."""


def make_optimizer(
    named: Parameters, config: schema.Optimizer, *, compute: torch.dtype, scratch: Path | None = None
) -> Optimizer:
    """The optimizer that `config` asks for, over `named` parameters that are in place (no longer on meta).

    `compute` is the precision of Muon's Newton-Schulz iteration; with `scratch`, an existing folder,
    AdamW's moments live in a file there (`layout.offload: disk`). All ranks must call it together.
    DoesNotFit where that folder has no room for the file.
    """
    if config.kind == "muon":
        matrices = {name: p for name, p in named.items() if is_hidden_matrix(name, p)}
        rest = {name: p for name, p in named.items() if name not in matrices}
        return Muon(matrices, AdamW(rest, config, InMemory()), config, compute)
    return AdamW(named, config, InMemory() if scratch is None else Mapped(scratch))
