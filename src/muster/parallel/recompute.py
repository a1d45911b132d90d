"""Activation recomputation (Chen et al. 2016): the backward pass computes again what the forward pass did not keep.

`full` keeps only each block's input; `selective` (Korthikanti et al. 2022) computes attention's scores and
probabilities again, which are most of what a block keeps and few of its operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from muster.model.transformer import Transformer


def apply(model: Transformer, kind: str) -> None:
    """Have the model's blocks recompute `none`, `selective` or `full`."""
    for block in model.blocks:
        if kind == "full":
            block.forward = recomputed(block.forward)  # type: ignore[method-assign]
        elif kind == "selective":
            block.attention.attend = recomputed(block.attention.attend)


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which keeps its arguments only and runs again in the backward pass."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The model draws no random numbers inside a block, so there is no RNG state to restore.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return wrapped
