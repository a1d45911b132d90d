"""Activation recomputation (Chen et al. 2016): the backward pass computes again what the forward pass did not keep.

`full` keeps only each block's input; `selective` (Korthikanti et al. 2022) computes attention's scores and
probabilities again, which are most of what a block keeps and few of its operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from muster.model.moe import MoE
from muster.model.transformer import Transformer


def apply(model: Transformer, kind: str) -> None:
    """Have the model's blocks recompute `none`, `selective` or `full`."""
    for block in model.blocks:
        if kind == "full":
            counted = block.mlp if isinstance(block.mlp, MoE) else None
            block.forward = recomputed(block.forward, counted)  # type: ignore[method-assign]
        elif kind == "selective":
            block.attention.attend = recomputed(block.attention.attend)


def recomputed(forward: Callable[..., Any], counted: MoE | None = None) -> Callable[..., Any]:
    """`forward`, which keeps its arguments only and runs again in the backward pass; `counted` counts once."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The model draws no random numbers inside a block, so there is no RNG state to restore.
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _not_counting(counted)),
            **kwargs,
        )

    return wrapped


@contextmanager
def _not_counting(moe: MoE | None) -> Iterator[None]:
    if moe is None:
        yield
        return
    moe.counting = False
    try:
        yield
    finally:
        moe.counting = True
