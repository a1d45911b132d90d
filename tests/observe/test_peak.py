from __future__ import annotations

import pytest
import torch

from muster.observe.peak import gemm_peak_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_plausible_and_leaves_the_random_state_alone(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    assert 1e8 < gemm_peak_flops(dtype, torch.device("cpu")) < 1e15
    assert torch.equal(torch.get_rng_state(), before)
