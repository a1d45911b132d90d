"""The sniff test: what counts as slow among ranks, and arithmetic that is checked without a second opinion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from muster.resilience.sniff import Speeds, outliers, product_is_right, sniff

CPU = torch.device("cpu")


def speeds(gemm: float = 100e9, copy: float = 10e9, link: float = 1e9) -> Speeds:
    return Speeds(gemm_flops=gemm, copy_bytes_per_s=copy, link_bytes_per_s=link, latency_s=1e-5)


def test_a_slow_rank_is_named_with_its_figure() -> None:
    found = outliers([speeds(gemm=g) for g in (100e9, 90e9, 105e9, 30e9)])
    assert len(found) == 1
    assert found[0].startswith("rank 3 is slow at matrix products: 30 GFLOP/s")
    assert "median is 100" in found[0]


@pytest.mark.parametrize(
    "ranks",
    [
        [speeds()],
        [speeds(gemm=100e9), speeds(gemm=55e9)],
        [speeds(gemm=g) for g in (100e9, 90e9, 60e9, 55e9)],
        [speeds(gemm=g) for g in (100e9, 20e9, 70e9, 19e9)],  # all over the place: a busy machine, not a rank
    ],
)
def test_what_is_no_outlier(ranks: list[Speeds]) -> None:
    assert outliers(ranks) == []


def test_of_two_ranks_one_is_slow_below_half_the_other() -> None:
    assert len(outliers([speeds(copy=10e9), speeds(copy=4e9)])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_product_is_right(dtype: torch.dtype) -> None:
    assert product_is_right(dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_bit_of_a_product_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "mm", flawed(torch.mm))
    assert not product_is_right(dtype, CPU)


def test_ranks_measure_each_other_and_name_the_one_that_is_wrong(run_ranks: Any) -> None:
    told = run_ranks(3, measure)
    assert told[0] == told[1] == told[2]
    assert len(told[0]) == 3
    assert all(min(rank) > 0 for rank in told[0])
    with pytest.raises(RuntimeError, match=r"rank 1: a torch.float32 product .* came out wrong"):
        run_ranks(2, measure, 1)


def measure(wrong: int | None = None) -> list[tuple[float, float, float, float]]:
    from dataclasses import astuple

    from muster.parallel.world import join

    with join() as world:
        if world.rank == wrong:
            torch.mm = flawed(torch.mm)
        return [astuple(rank) for rank in sniff(torch.float32, world)]


def flawed(honest: Any) -> Any:
    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = honest(a, b)
        product.view(torch.int32 if a.dtype == torch.float32 else torch.int16)[700, 3] ^= 1 << (
            23 if a.dtype == torch.float32 else 7
        )
        return product

    return mm
