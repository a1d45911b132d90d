"""The fingerprint of a tensor sees every bit and its place, and the majority says which rank is wrong."""

from __future__ import annotations

import random

import pytest
import torch

from muster.resilience.copies import fingerprint, odd_ones_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [1, 3, 8191, 8192, 20_001])
def test_any_flipped_bit_changes_it(dtype: torch.dtype, size: int) -> None:
    draw = random.Random(size)
    tensor = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = int(fingerprint(tensor))
    raw = tensor.view(torch.uint8)
    for _ in range(50):
        place, bit = draw.randrange(len(raw)), 1 << draw.randrange(8)
        raw[place] ^= bit
        assert int(fingerprint(tensor)) != before
        raw[place] ^= bit
    assert int(fingerprint(tensor)) == before


def test_the_highest_bit_of_a_word_counts_in_every_part_of_the_table() -> None:
    words = torch.zeros(3 * 1024 + 5, dtype=torch.int64)
    for place in (0, 1, 1023, 1024, 3071, 3072, 3076):
        words[place] = -(1 << 63)
        assert int(fingerprint(words)) != 0
        words[place] = 0


def test_order_counts() -> None:
    tensor = torch.randn(5000)
    for a, b in ((0, 1), (0, 2), (2, 2048), (4000, 4999)):
        swapped = tensor.clone()
        swapped[[a, b]] = tensor[[b, a]]
        assert int(fingerprint(swapped)) != int(fingerprint(tensor))


def test_neither_strides_nor_the_place_in_memory_count() -> None:
    tensor = torch.randn(70, 90)
    apart = torch.randn(3 + tensor.numel())[3:].view(70, 90)
    apart.copy_(tensor)
    expected = int(fingerprint(tensor))
    assert int(fingerprint(apart)) == expected
    assert int(fingerprint(tensor.t().contiguous().t())) == expected
    assert int(fingerprint(torch.empty(0))) == int(fingerprint(torch.empty(0, 5)))


@pytest.mark.parametrize(
    ("prints", "odd"),
    [
        ({0: 7, 1: 7}, []),
        ({0: 7, 1: 8}, [0, 1]),
        ({0: 7, 3: 8, 5: 7}, [3]),
        ({0: 7, 1: 7, 2: 8, 3: 8}, [0, 1, 2, 3]),
        ({0: 7, 1: 7, 2: 8, 3: 9, 4: 7}, [2, 3]),
    ],
)
def test_the_majority_says_who_is_wrong(prints: dict[int, int], odd: list[int]) -> None:
    assert odd_ones_out(prints) == odd
