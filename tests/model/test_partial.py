"""Attention in parts: any split of the keys, in any order, merges to the attention over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muster.model.partial import Outcome, Running, Sight, attend_part_, grad_part_
from tests.model.test_attend import reference


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_parts_of_the_keys_merge_to_the_whole(window: int | None, packed: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    T, cuts = 300, [(200, 300), (0, 70), (70, 200)]
    q = torch.randn(2, 4, T, 16, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, T, 16, requires_grad=True) for _ in range(2))
    documents = torch.randint(0, 2, (2, T)).cumsum(1) // 9 if packed else None
    upstream = torch.randn(2, 4, T, 16)
    whole = reference(q, k, v, documents, window)
    expected = torch.autograd.grad(whole, (q, k, v), upstream)

    def parts() -> list[tuple[slice, Sight]]:
        ids = [None if documents is None else (documents, documents[:, a:b]) for a, b in cuts]
        return [(slice(a, b), Sight(-a, window, pair)) for (a, b), pair in zip(cuts, ids, strict=True)]

    with torch.no_grad():
        running = Running(q)
        for keys, sight in parts():
            attend_part_(running, slice(0, T), q, k[:, :, keys], v[:, :, keys], sight)
        torch.testing.assert_close(running.out, whole, atol=1e-5, rtol=1e-5)
        outcome = Outcome(running.out, running.lse, upstream)
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for keys, sight in parts():
            into = (grads[0], grads[1][:, :, keys], grads[2][:, :, keys])
            grad_part_(into, outcome, q, k[:, :, keys], v[:, :, keys], sight)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_tiles_cover_the_visible_pairs_and_little_else() -> None:
    T, window = 4096, 100
    sight = Sight(0, window)
    tiles = list(sight.tiles(T, T, torch.device("cpu")))
    covered = torch.zeros(T, T, dtype=torch.bool)
    for rows, columns in tiles:
        assert not covered[rows, columns].any(), "a pair would count twice"
        covered[rows, columns] = True
    distance = torch.arange(T)[:, None] - torch.arange(T)
    assert covered[(distance >= 0) & (distance < window)].all()
    assert covered.float().mean() < 0.06


@pytest.mark.parametrize(
    ("sight", "shape"),
    [
        (Sight(0), "triangle"),
        (Sight(8), "all"),
        (Sight(7), "all"),
        (Sight(3), "other"),
        (Sight(0, window=8), "triangle"),
        (Sight(0, window=7), "other"),
        (Sight(8, window=16), "all"),
        (Sight(8, window=15), "other"),
    ],
)
def test_shape_of_what_is_visible(sight: Sight, shape: str) -> None:
    assert sight.shape(8, 8) == shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention runs on GPUs")
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flash_parts_equal_tiles(kv_heads: int) -> None:
    torch.manual_seed(0)
    T, half = 512, 256
    q = torch.randn(2, 4, T, 64)
    k, v = (torch.randn(2, kv_heads, T, 64) for _ in range(2))
    upstream = torch.randn_like(q)

    def run(*tensors: Tensor) -> list[Tensor]:
        q, k, v, upstream = tensors
        running, grads = Running(q), [torch.zeros(x.shape, device=q.device) for x in (q, k, v)]
        pairs = [(rows, keys) for rows in (0, half) for keys in (0, half) if keys <= rows]
        for rows, keys in pairs:
            r, c = slice(rows, rows + half), slice(keys, keys + half)
            attend_part_(running, r, q[:, :, r], k[:, :, c], v[:, :, c], Sight(rows - keys))
        outcome = Outcome(running.out.to(q.dtype), running.lse, upstream)
        for rows, keys in pairs:
            r, c = slice(rows, rows + half), slice(keys, keys + half)
            into = (grads[0][:, :, r], grads[1][:, :, c], grads[2][:, :, c])
            grad_part_(into, outcome.rows(r), q[:, :, r], k[:, :, c], v[:, :, c], Sight(rows - keys))
        return [running.out, *grads]

    for fast, exact in zip(
        run(*(x.to("cuda", torch.bfloat16) for x in (q, k, v, upstream))), run(q, k, v, upstream), strict=True
    ):
        torch.testing.assert_close(fast.float().cpu(), exact, atol=3e-2, rtol=3e-2)
