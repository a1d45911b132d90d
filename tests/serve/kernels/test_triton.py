"""Triton's kernels against their definition: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from muster.serve.kernels.reference import Reference
from muster.serve.kernels.shape import Heads, QKNorm
from tests.serve.kernels.ragged import ragged, random_table
from tests.serve.kernels.test_ops import _spoil_unused, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined
pytest.importorskip("triton", reason="Triton comes with torch for GPUs, and is not installed here")

from muster.serve.kernels.triton_ops import Triton  # noqa: E402

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3} | ({torch.bfloat16: 8e-3} if DEVICE == "cuda" else {})
"""The interpreter multiplies bf16 as if it were whole numbers, and cuts off where a GPU rounds."""
DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, width in ((1, 1), (3, 48), (5, 768)):
        x, residual = torch.randn(2, rows, width, device=DEVICE).to(dtype)
        weight = torch.rand(width, device=DEVICE)
        for added in (None, residual):
            mine, theirs = x.clone(), x.clone()
            found = Triton(dtype, DEVICE).add_norm(mine, added, weight, 1e-5)
            exact = Reference(dtype, DEVICE).add_norm(theirs, added, weight, 1e-5)
            assert_close(mine, theirs, TOLERANCE[dtype])
            assert_close(found, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, width in ((1, 1), (7, 50), (4, 1500)):
        x = torch.randn(rows, 2 * width, device=DEVICE).mul_(5).to(dtype)
        x[0, 0], x[-1, 0] = -80, 300
        exact = Reference(dtype, DEVICE).swiglu(x)
        assert_close(Triton(dtype, DEVICE).swiglu(x), exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads",
    [
        Heads(heads=4, kv_heads=2, dim=64),
        Heads(heads=8, kv_heads=1, dim=80, window=7),
        Heads(heads=6, kv_heads=6, dim=10),
        Heads(heads=28, kv_heads=4, dim=20, window=64),
    ],
)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("prompts", [True, False])
def test_attention(dtype: torch.dtype, heads: Heads, normed: bool, prompts: bool) -> None:
    torch.manual_seed(0)
    lengths = (1, 70, 200, 5, 131)
    new = (1, 3, 40, 1, 1) if prompts else (1, 1, 1, 1, 1)
    table = random_table(len(lengths), 200, 16).to(DEVICE)
    batch = ragged([torch.zeros(n, dtype=torch.int64) for n in lengths], new, table.cpu(), 16).to(DEVICE)
    N, D = len(batch.tokens), heads.dim
    pages = torch.randn(2, table.numel(), heads.kv_heads, 16, D, device=DEVICE).to(dtype)
    _spoil_unused(pages, lengths, table, 16)
    qkv = torch.randn(N, (heads.heads + 2 * heads.kv_heads) * D, device=DEVICE).to(dtype)
    angles = torch.randn(N, D // 2, device=DEVICE).repeat(1, 2)
    norm = QKNorm(q=torch.rand(D, device=DEVICE), k=torch.rand(D, device=DEVICE), eps=1e-5)
    results = []
    for kernels in (Triton(dtype, DEVICE), Reference(dtype, DEVICE)):
        own, (keys, values) = qkv.clone(), pages.clone()
        rotation = (angles.cos(), angles.sin()) if normed else None
        kernels.rotate_store(own, heads, rotation, norm if normed else None, batch.slots, keys, values)
        out = kernels.attend(own, heads, batch, keys, values)
        results.append((own[:, : heads.heads * D], keys.nan_to_num(), values.nan_to_num(), out))
    for found, exact in zip(*results, strict=True):
        assert_close(found, exact, TOLERANCE[dtype])
