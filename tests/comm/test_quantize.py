"""What block-wise int8 keeps of a buffer, and that it hides nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muster.comm.quantize import BLOCK, add_decoded, decode, encode, encoded_bytes


def through(values: Tensor) -> Tensor:
    out = torch.empty_like(values)
    decode(encode(values), out)
    return out


@pytest.mark.parametrize("elements", [1, BLOCK - 1, BLOCK, 3 * BLOCK, 5 * BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_half_a_code_of_its_block(elements: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(elements)
    scale = torch.logspace(-4, 2, elements)  # blocks of very different magnitude
    values = (torch.randn(3, elements, generator=generator) * scale).to(dtype)
    assert encode(values).shape == (3, encoded_bytes(elements))
    error = (through(values).double() - values.double()).abs()
    for start in range(0, elements, BLOCK):
        block = slice(start, start + BLOCK)
        largest = values[:, block].double().abs().amax(-1, keepdim=True)
        rounding = largest * torch.finfo(dtype).eps
        assert bool((error[:, block] <= largest / 254 + rounding).all())


def test_rows_do_not_know_each_other() -> None:
    rows = torch.randn(4, BLOCK + 9, generator=torch.Generator().manual_seed(0))
    rows[1] *= 1000
    together = encode(rows)
    for row, encoded in zip(rows, together, strict=True):
        assert torch.equal(encode(row[None])[0], encoded)


def test_a_piece_border_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(2, 7 * BLOCK + 3, generator=torch.Generator().manual_seed(0))
    at_once = encode(values)
    monkeypatch.setattr("muster.comm.quantize._CPU_PIECE", 2 * BLOCK)
    assert torch.equal(encode(values), at_once)


def test_zeros_and_codes_themselves_are_exact() -> None:
    values = torch.stack([torch.zeros(BLOCK), torch.arange(BLOCK).float() - 127]).clamp(-127, 127)
    assert torch.equal(through(values), values)


def test_add_decoded_finds_the_error() -> None:
    values = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    encoded, error = encode(values), values.clone()
    add_decoded(encoded, error, factor=-1.0)
    assert torch.allclose(through(values) + error, values, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    values = torch.ones(1, 2 * BLOCK)
    values[0, 5] = bad
    out = through(values)
    assert not bool(out[0, 5].isfinite())
    assert bool(out[0, BLOCK:].isfinite().all()), "the next block is unharmed"
