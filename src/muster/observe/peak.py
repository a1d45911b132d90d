"""This machine's peak, measured: the fastest matrix product it will do, which MFU is a share of."""

from __future__ import annotations

import time

import torch

_CPU_SIZE, _GPU_SIZE = 1024, 8192
_BUDGET_S = 0.25


def gemm_peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Best rate of a square matrix product in FLOP/s, with this process's threads; takes about 0.3 s."""
    size = _GPU_SIZE if device.type == "cuda" else _CPU_SIZE
    own = torch.Generator(device).manual_seed(0)  # the run's own random state stays as it is
    a, b = (torch.randn(size, size, generator=own, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)  # the first product also chooses and loads a kernel
    best = float("inf")
    deadline = time.perf_counter() + _BUDGET_S
    while time.perf_counter() < deadline or best == float("inf"):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
