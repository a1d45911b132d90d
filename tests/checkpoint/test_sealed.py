"""A sealed record: every single flipped bit is found."""

from __future__ import annotations

import pytest

from muster.checkpoint.sealed import seal, unseal

PLAIN = {"format": 2, "name": "x", "figures": [1, 2.5, None], "files": {"a": {"bytes": 3}, "b": {"bytes": 3}}}


def test_it_reads_back() -> None:
    assert unseal(seal(PLAIN)) == PLAIN


def test_any_flipped_bit_is_found() -> None:
    content = seal(PLAIN)
    for index in range(len(content)):
        for bit in range(8):
            harmed = bytearray(content)
            harmed[index] ^= 1 << bit
            with pytest.raises(ValueError):
                unseal(bytes(harmed))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"a": 1}', b"\xff"])
def test_what_was_never_sealed(content: bytes) -> None:
    with pytest.raises(ValueError):
        unseal(content)
