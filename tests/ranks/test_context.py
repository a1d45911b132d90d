"""Attention over split sequences gives what `attend` gives on whole ones, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muster.model.attend import attend
from muster.parallel.context import Kind
from muster.parallel.ring import Ring
from muster.parallel.sequence import split
from muster.parallel.ulysses import Ulysses
from muster.parallel.world import join

STRATEGIES = {"ulysses": Ulysses, "ring": Ring}
HEADS = {"multi-head": (4, 4), "grouped": (4, 2), "one kv head": (4, 1), "twelve over three": (12, 3)}
MASKS: dict[str, tuple[bool, int | None]] = {
    "causal": (False, None),
    "documents": (True, None),
    "window": (False, 5),
    "wide window": (False, 23),
    "documents and window": (True, 11),
}
LENGTHS = [8, 64]


def inputs(heads: int, kv_heads: int, length: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output for whole sequences; document ids that start at any token."""
    torch.manual_seed(length)
    shapes = [heads, kv_heads, kv_heads, heads]
    tensors = [torch.randn(2, n, length, 16).to(dtype) for n in shapes]
    return tensors, (torch.rand(2, length) < 0.15).cumsum(1)


def apart(kind: Kind, tensors: list[Tensor], documents: Tensor | None, window: int | None) -> list[Tensor]:
    """Output and gradients of q, k, v, computed on split sequences and put together again."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    q, k, v, upstream = (split(x, 2, rank=rank, ranks=ranks, kind=kind) for x in tensors)
    # What a transformer passes: heads and tokens swapped by a view.
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    assert dist.group.WORLD is not None
    out = STRATEGIES[kind](dist.group.WORLD)(q, k, v, documents=documents, window=window)
    wholes = []
    for part in (out, *torch.autograd.grad(out, (q, k, v), upstream)):
        parts = [torch.empty_like(part.contiguous()) for _ in range(ranks)]
        dist.all_gather(parts, part.detach().contiguous())
        wholes.append(unsplit(parts, kind))
    return wholes


def unsplit(parts: list[Tensor], kind: Kind) -> Tensor:
    """The whole (B, H, T, D) that `split` gave these parts of, in the order of ranks."""
    whole = torch.cat(parts, 2)
    at = [
        split(torch.arange(whole.shape[2]), 0, rank=rank, ranks=len(parts), kind=kind)
        for rank in range(len(parts))
    ]
    return whole[:, :, torch.cat(at).argsort()]


def together(tensors: list[Tensor], documents: Tensor | None, window: int | None) -> list[Tensor]:
    q, k, v, upstream = tensors
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, documents=documents, window=window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


def differences(kind: Kind, dtype: torch.dtype, lengths: list[int]) -> dict[str, float]:
    """The largest relative difference of output and gradients, case by case."""
    found = {}
    with join(timeout_s=60):
        for heads, (H, K) in HEADS.items():
            for mask, (packed, window) in MASKS.items():
                for length in lengths:
                    tensors, documents = inputs(H, K, length, dtype)
                    ids = documents if packed else None
                    exact = together([x.float() for x in tensors], ids, window)
                    ours = apart(kind, tensors, ids, window)
                    assert all(x.dtype == dtype for x in ours)
                    found[f"{heads}, {mask}, {length} tokens"] = max(
                        float((x.float() - y).norm() / y.norm()) for x, y in zip(ours, exact, strict=True)
                    )
    return found


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_same_as_on_whole_sequences(kind: Kind, ranks: int, run_ranks: Any) -> None:
    for found in run_ranks(ranks, differences, kind, torch.float32, LENGTHS):
        assert len(found) == len(HEADS) * len(MASKS) * len(LENGTHS)
        assert {case: error for case, error in found.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_bf16_is_within_rounding(kind: Kind, run_ranks: Any) -> None:
    found = run_ranks(2, differences, kind, torch.bfloat16, [64])[0]
    assert {case: error for case, error in found.items() if not error <= 1e-2} == {}


def difference_without_gradients(kind: Kind) -> float:
    with join(timeout_s=60) as world, torch.no_grad():
        (q, k, v, _), _ = inputs(4, 2, 16, torch.float32)
        parts = [split(x, 2, rank=world.rank, ranks=world.size, kind=kind) for x in (q, k, v)]
        assert dist.group.WORLD is not None
        ours = STRATEGIES[kind](dist.group.WORLD)(*parts)
        expected = split(attend(q, k, v), 2, rank=world.rank, ranks=world.size, kind=kind)
        return float((ours - expected).abs().max())


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_evaluation_needs_no_gradients(kind: Kind, run_ranks: Any) -> None:
    assert all(error < 1e-5 for error in run_ranks(2, difference_without_gradients, kind))
