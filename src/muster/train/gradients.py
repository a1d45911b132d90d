"""The global gradient norm, clipping, and the search for the parameter whose gradient is not finite."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def global_norm(model: nn.Module) -> float:
    """The 2-norm of all gradients over all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


@torch.no_grad()
def clip(model: nn.Module, norm: float, limit: float) -> None:
    """Scale the gradients so that their norm is at most `limit` (Pascanu et al. 2013)."""
    if norm > limit:
        gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, limit / norm)


def first_bad_parameter(model: nn.Module) -> str:
    """Name of the first parameter whose gradient holds a nan or inf on any rank; all ranks must call it."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad = [index for index, (_, grad) in enumerate(named) if not bool(torch.isfinite(_local(grad)).all())]
    first = torch.tensor(min(bad, default=len(named)))
    if dist.is_initialized() and dist.get_world_size() > 1:
        first = first.to(_local(named[0][1]).device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return named[int(first)][0] if int(first) < len(named) else "none: only their norm overflowed"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
