"""The C++ operations equal those in torch, and a row's result does not depend on the rows beside it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from muster.serve.engine.batch import PagedCache
from muster.serve.kernels.native import Native
from muster.serve.kernels.packing import GROUP, Format, Weights, floats, mixed, pack, quantize, unpack
from muster.serve.kernels.pages import from_rows, to_rows
from muster.serve.kernels.reference import Reference
from muster.serve.kernels.shape import KV, Heads, QKNorm
from tests.serve.kernels.ragged import ragged, random_table

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Relative to the largest element: a few roundings of the type."""
ROUNDED: list[tuple[Format, bool]] = [("int8", False), ("int8", True), ("int4", False), ("int4", True)]
"""Formats, and whether what matters most is kept apart."""
SHAPES = [(64, 64), (33, 100), (7, 10), (257, 48), (96, 768), (1, 2)]


def assert_close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert found.shape == exact.shape
    assert float((found.double() - exact.double()).abs().max()) <= tolerance * float(
        exact.double().abs().max()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "low_rank"), [("float", False), *ROUNDED])
def test_linear(each_library: ctypes.CDLL, dtype: torch.dtype, format: str, low_rank: bool) -> None:
    torch.manual_seed(0)
    native, exact = Native(each_library, dtype), Reference(torch.float32)
    kind: Format = ("fp32" if dtype == torch.float32 else "bf16") if format == "float" else format  # type: ignore[assignment]
    for features, inputs in SHAPES:
        for bias in (None, torch.randn(features)):
            plain = quantize(torch.randn(features, inputs), bias, kind, low_rank=low_rank)
            for rows in (1, 2, 11, 12, 13, 25, 67):
                x = torch.randn(rows, inputs).to(dtype)
                expected = exact.linear(plain, torch.float32)(x.float())
                # What is left without its parts differs in its last bits, and then here and there by a step.
                assert_close(native.linear(plain, torch.float32)(x), expected, 2e-3 if low_rank else 2e-5)
                assert_close(native.linear(plain, torch.bfloat16)(x), expected, 8e-3)


@pytest.mark.parametrize(("format", "low_rank"), [("fp32", False), ("bf16", False), *ROUNDED])
def test_packing_loses_nothing(format: Format, low_rank: bool) -> None:
    for features, inputs in SHAPES:
        plain = quantize(torch.randn(features, inputs), torch.randn(features), format, low_rank=low_rank)
        back = unpack(pack(plain))
        assert back.tensors().keys() == plain.tensors().keys()
        for name, tensor in plain.tensors().items():
            assert torch.equal(back.tensors()[name], tensor), name


@pytest.mark.parametrize(("format", "most"), [("bf16", 0.004), ("int8", 0.01), ("int4", 0.11)])
def test_quantising_keeps_the_weights(format: Format, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    weight[3] = 0
    error = floats(quantize(weight, None, format)).float() - weight
    assert 0 < float(error.norm() / weight.norm()) < most
    assert not error[3].any()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_low_rank_keeps_what_matters_most(format: Format) -> None:
    """Of a matrix, and of the products with inputs that mostly lie where it is largest."""
    torch.manual_seed(0)
    strong = torch.randn(96, 8) @ torch.randn(8, 256) + 0.25 * torch.randn(96, 256)
    x = 4 * torch.randn(40, 8) @ torch.linalg.svd(strong).Vh[:8] + torch.randn(40, 256)
    errors = []
    for low_rank in (False, True):
        plain = quantize(strong, None, format, low_rank=low_rank)
        product = Reference(torch.float32).linear(plain, torch.float32)(x)
        errors.append((float((floats(plain) - strong).norm()), float((product - x @ strong.T).norm())))
    (weights, products), (less, least) = errors
    assert less < weights / 3
    assert least < products / 1.5


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
def test_rows_do_not_depend_on_their_neighbours(each_library: ctypes.CDLL, format: Format) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    linear = Native(each_library, dtype).linear(
        quantize(torch.randn(70, 330), torch.randn(70), format, low_rank=True), dtype
    )
    x = torch.randn(67, 330).to(dtype)
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (0, 2, 5, 12, 13, 31, 67):
        for start in (0, 67 - rows):
            assert torch.equal(linear(x[start : start + rows]), alone[start : start + rows])


@pytest.mark.parametrize(("format", "low_rank"), [("fp32", False), *ROUNDED])
def test_levels_agree_bit_by_bit(
    library: ctypes.CDLL, each_library: ctypes.CDLL, format: Format, low_rank: bool
) -> None:
    """bf16 alone does not, since AVX512-BF16 rounds its products in its own way."""
    torch.manual_seed(0)
    for features, inputs in (*SHAPES, (70, 330)):
        plain = quantize(torch.randn(features, inputs), torch.randn(features), format, low_rank=low_rank)
        x = torch.randn(37, inputs)
        best, other = (
            Native(one, torch.float32).linear(plain, torch.float32) for one in (library, each_library)
        )
        assert torch.equal(best(x), other(x))
        assert torch.equal(best(x), torch.cat([other(row[None]) for row in x]))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_largest_products_are_exact(each_library: ctypes.CDLL, format: Format) -> None:
    """Pairs of bytes whose products do not fit into 16 bits, and sums of a group that nearly do not."""
    torch.manual_seed(0)
    inputs, ends = 256, (-127, 127) if format == "int8" else (-8, 7)
    signs = torch.randint(2, (8, inputs)) * 2 - 1
    signs[0], signs[1], signs[2, ::2] = 1, -1, 1
    activations, whole = signs * 127, torch.where(signs > 0, ends[1], ends[0])
    whole = torch.cat([whole, torch.randint(ends[0], ends[1] + 1, (8, inputs))])
    factor = (
        torch.tensor([1, -1, 15, -15])[torch.randint(4, (16, inputs // GROUP))] if format == "int4" else None
    )
    plain = Weights(
        format=format, features=16, inputs=inputs, packed=False, weight=whole.to(torch.int8), scale=torch.ones(16),
        factor=None if factor is None else factor.to(torch.int8),
    )  # fmt: skip
    linear = Native(each_library, torch.float32).linear(plain, torch.float32)
    found = linear(mixed(activations.float()).repeat(5, 1))  # which mixing undoes
    if factor is not None:
        whole = whole * factor.repeat_interleave(GROUP, 1)
    assert_close(found, (activations @ whole.T).repeat(5, 1), 1e-6)


def test_zero_rows_stay_zero(each_library: ctypes.CDLL) -> None:
    formats: tuple[Format, ...] = ("int8", "int4")
    for format in formats:
        linear = Native(each_library, torch.float32).linear(
            quantize(torch.randn(9, 33), None, format, low_rank=True), torch.float32
        )
        assert not linear(torch.zeros(3, 33)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm(each_library: ctypes.CDLL, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    native, reference = Native(each_library, dtype), Reference(dtype)
    for rows, width in ((1, 1), (3, 48), (67, 100), (5, 768), (64, 1024)):
        x, residual, weight = (
            torch.randn(rows, width).to(dtype),
            torch.randn(rows, width).to(dtype),
            torch.rand(width),
        )
        for added in (None, residual):
            mine, theirs = x.clone(), x.clone()
            found, exact = (
                kernels.add_norm(own, added, weight, 1e-5)
                for kernels, own in ((native, mine), (reference, theirs))
            )
            assert torch.equal(mine, theirs)
            assert_close(found, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(each_library: ctypes.CDLL, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, width in ((1, 1), (67, 50), (40, 1024)):
        x = torch.randn(rows, 2 * width).mul_(5).to(dtype)
        x[0, 0], x[-1, 0] = -300, 300
        assert_close(Native(each_library, dtype).swiglu(x), Reference(dtype).swiglu(x), TOLERANCE[dtype])


ATTENTION = [
    Heads(heads=4, kv_heads=2, dim=64),
    Heads(heads=8, kv_heads=1, dim=80, window=7),
    Heads(heads=6, kv_heads=6, dim=10),
    Heads(heads=8, kv_heads=2, dim=128, window=100),
    Heads(heads=3, kv_heads=1, dim=32, window=1),
    Heads(heads=5, kv_heads=1, dim=32, window=64),
    Heads(heads=28, kv_heads=4, dim=20),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", ATTENTION)
@pytest.mark.parametrize("block_tokens", [5, 16])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("kv", [None, "int8"])
def test_attention(
    each_library: ctypes.CDLL,
    dtype: torch.dtype,
    heads: Heads,
    block_tokens: int,
    normed: bool,
    kv: KV | None,
) -> None:
    torch.manual_seed(0)
    lengths, new = (1, 70, 200, 5, 131, 64, 65), (1, 70, 40, 1, 1, 1, 2)
    table = random_table(len(lengths), 200, block_tokens)
    batch = ragged([torch.zeros(n, dtype=torch.int64) for n in lengths], new, table, block_tokens)
    N, D = len(batch.tokens), heads.dim
    pages = torch.randn(2, table.numel(), heads.kv_heads, block_tokens, D).to(dtype)
    pages = pages if kv is None else to_rows(pages)
    _spoil_unused(pages, lengths, table, block_tokens)
    qkv = torch.randn(N, (heads.heads + 2 * heads.kv_heads) * D).to(dtype)
    angles = torch.randn(N, D // 2).repeat(1, 2)
    norm = QKNorm(q=torch.rand(D), k=torch.rand(D), eps=1e-5) if normed else None
    results = []
    for kernels in (Native(each_library, dtype), Reference(dtype)):
        own, (keys, values) = qkv.clone(), pages.clone()
        rotation = (angles.cos(), angles.sin()) if normed else None
        kernels.rotate_store(own, heads, rotation, norm, batch.slots, keys, values)
        out = kernels.attend(own, heads, batch, keys, values)
        if kv is not None:
            keys, values = from_rows(keys), from_rows(values)
        results.append((own[:, : heads.heads * D], values.nan_to_num(), keys.nan_to_num(), out))
    for index, (found, exact) in enumerate(zip(*results, strict=True)):
        # What the two have turned differs by a rounding, and then by a whole number of 127 here and there.
        off = 1 / 127 if kv is not None and normed and index >= 2 else 0
        assert_close(found, exact, TOLERANCE[dtype] + off)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_int8(each_library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Both write the same bytes; a number is off by half a step at most, zeros stay, and what is not finite shows."""
    heads = Heads(heads=1, kv_heads=3, dim=36)
    qkv = torch.randn(9, (1 + 2 * 3) * 36).mul_(torch.logspace(-9, 9, 9)[:, None]).to(dtype)
    qkv[1, 36:] = 0
    for row, value in ((2, float("nan")), (3, float("inf"))):
        qkv[row, 40] = value
    written = []
    for kernels in (Native(each_library, dtype), Reference(dtype)):
        keys, values = torch.zeros(2, 2, 3, 5, 40, dtype=torch.int8)
        kernels.rotate_store(qkv.clone(), heads, None, None, torch.arange(9), keys, values)
        written.append(torch.stack([keys, values]).transpose(2, 3).flatten(1, 2)[:, :9].flatten(0, 2))
    x = qkv[:, 36:].view(9, 2, 3, 36).transpose(0, 1).float().flatten(0, 2)
    finite = x.isfinite().all(-1)
    assert (~finite).sum() == 2
    assert torch.equal(written[0][finite], written[1][finite])
    for rows in written:
        assert ((from_rows(rows) - x).abs() <= x.abs().amax(-1, keepdim=True) / 127 * 0.501)[finite].all()
        assert not from_rows(rows)[~finite].isfinite().any()


def _spoil_unused(pages: Tensor, lengths: tuple[int, ...], table: Tensor, block_tokens: int) -> None:
    """What lies in pages behind a sequence's end must not matter."""
    nothing = float("nan") if pages.is_floating_point() else -1  # four bytes of which are nan as well
    for length, blocks in zip(lengths, table, strict=True):
        for position in range(length, len(blocks) * block_tokens):
            pages[:, blocks[position // block_tokens], :, position % block_tokens] = nothing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv", [None, "int8"])
@pytest.mark.parametrize(
    "heads", [Heads(heads=6, kv_heads=2, dim=64), Heads(heads=4, kv_heads=4, dim=20, window=33)]
)
def test_attention_is_the_same_bits_however_it_is_cut(
    each_library: ctypes.CDLL, dtype: torch.dtype, heads: Heads, kv: KV | None
) -> None:
    torch.manual_seed(0)
    kernels, table = Native(each_library, dtype), random_table(2, 150, 16)
    tokens, others = torch.zeros(150, dtype=torch.int64), torch.zeros(90, dtype=torch.int64)
    pages = torch.randn(2, table.numel(), heads.kv_heads, 16, heads.dim).to(dtype)
    keys, values = pages if kv is None else to_rows(pages)
    qkv = torch.randn(150, (heads.heads + 2 * heads.kv_heads) * heads.dim).to(dtype)

    def attend(length: int, count: int) -> Tensor:
        """The last `count` of a sequence's first `length` tokens, with another sequence's token before it."""
        batch = ragged([others, tokens[:length]], (1, count), table, 16)
        rows = torch.cat([qkv[:1], qkv[length - count : length]])
        return kernels.attend(rows, heads, batch, keys, values)[1:]

    whole = attend(150, 150)
    for cut in (1, 7, 64, 149):
        assert torch.equal(torch.cat([attend(cut, cut), attend(150, 150 - cut)]), whole)
    assert torch.equal(torch.cat([attend(n, 1) for n in range(1, 151)]), whole)


def test_a_batch_that_leaves_its_cache_is_refused(library: ctypes.CDLL) -> None:
    kernels, table = Native(library, torch.float32), random_table(2, 8, 4)
    pages = torch.zeros(table.numel(), 1, 4, 8)
    cache = PagedCache(keys=(pages,), values=(pages,))
    good = ragged([torch.arange(5), torch.arange(8)], (2, 1), table, 4)
    kernels.check(good, cache, 10)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "tokens": lambda x: x + 7,
        "slots": lambda x: x + 16,
        "starts": lambda x: x + 1,
        "lengths": lambda x: x + 1,
        "table": lambda x: x + 4,
        "wanted": lambda x: x + 1,
    }
    for name, change in changes.items():
        with pytest.raises(IndexError, match="disagree"):
            kernels.check(replace(good, **{name: change(getattr(good, name))}), cache, 10)


def test_what_does_not_fit_is_refused(library: ctypes.CDLL) -> None:
    kernels = Native(library, torch.bfloat16)
    linear = kernels.linear(quantize(torch.randn(8, 16), None, "bf16"), torch.bfloat16)
    for wrong in (
        torch.zeros(2, 17).bfloat16(),
        torch.zeros(2, 16),
        torch.zeros(16).bfloat16(),
        torch.zeros(2, 16).half(),
    ):
        with pytest.raises(TypeError):
            linear(wrong)
    with pytest.raises(TypeError, match="float16"):
        Native(library, torch.float16)
    with pytest.raises(TypeError, match="contiguous"):
        kernels.add_norm(torch.zeros(4, 3).bfloat16().t(), None, torch.ones(4), 1e-5)
