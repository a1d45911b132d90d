"""The operations of a decoding step on a GPU, in Triton: one launch each, and nothing that waits for the host, so
that a whole step can be captured as a graph (`serve/engine/graphs.py`). Equal to `reference.py`, which does the rest.

Only imported where there is a GPU, or under Triton's interpreter, which the tests use.
N new tokens, S sequences, H heads, K kv heads, G = H / K, D head dim, E width, F ffn, P pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muster.serve.engine.batch import Batch
from muster.serve.kernels.reference import Reference
from muster.serve.kernels.shape import Heads, QKNorm, Rotation

_MOST_PARTS = 32
"""That a sequence's keys are divided into: enough to occupy the GPU with one sequence, few enough to add up again."""
_PROGRAMS = 264
"""Attention's programs that are aimed at: two for each multiprocessor of an H100."""
_TILE = 64
"""Keys of a step of attention: four blocks of the cache."""
_SMALLEST = 16
"""Rows of the smallest matrix product that Triton has."""


class Triton(Reference):
    """`Reference` on a GPU, with Triton's kernels for what a decoding step consists of besides products."""

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        size = triton.next_power_of_2(x.shape[1])
        _add_norm[(len(x),)](
            x, x if residual is None else residual, weight, out, x.shape[1], eps, residual is not None, size
        )
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        rows, ffn = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty(rows, ffn, dtype=gate_up.dtype, device=gate_up.device)
        _swiglu[(rows, triton.cdiv(ffn, 1024))](gate_up, out, ffn, 1024)
        return out

    def rotate_store(
        self, qkv: Tensor, heads: Heads, rotation: Rotation | None, norm: QKNorm | None, slots: Tensor,
        keys: Tensor, values: Tensor,
    ) -> None:  # fmt: skip
        if keys.dtype == torch.int8:
            return super().rotate_store(qkv, heads, rotation, norm, slots, keys, values)
        cos, sin = (qkv, qkv) if rotation is None else rotation
        q_norm, k_norm, eps = (qkv, qkv, 0.0) if norm is None else (norm.q, norm.k, norm.eps)
        columns = heads.heads + 2 * heads.kv_heads
        _rotate_store[(len(qkv), columns)](
            qkv, cos, sin, q_norm, k_norm, eps, slots, keys, values, heads.heads, heads.kv_heads, heads.dim,
            keys.shape[2], rotation is not None, norm is not None, triton.next_power_of_2(heads.dim),
        )  # fmt: skip

    def attend(self, qkv: Tensor, heads: Heads, batch: Batch, keys: Tensor, values: Tensor) -> Tensor:
        """Of single tokens by FlashDecoding (Dao et al. 2023): parts of a sequence's keys at once, then their sum."""
        if len(batch.tokens) > len(batch.lengths) or keys.dtype == torch.int8:
            return super().attend(qkv, heads, batch, keys, values)
        sequences, dim = len(batch.lengths), heads.dim
        wanted = triton.cdiv(_PROGRAMS, sequences * heads.kv_heads)
        parts = min(triton.next_power_of_2(wanted), _MOST_PARTS)
        size = triton.next_power_of_2(dim)
        shape = (sequences, heads.heads, parts)
        part = torch.empty(*shape, dim, dtype=torch.float32, device=qkv.device)
        largest, total = (torch.empty(shape, dtype=torch.float32, device=qkv.device) for _ in range(2))
        _attend_part[(sequences, heads.kv_heads, parts)](
            qkv, keys, values, batch.table, batch.lengths, part, largest, total, dim**-0.5, heads.window or 0,
            qkv.shape[1], batch.table.shape[1], heads.heads, heads.kv_heads, heads.group, dim, keys.shape[2],
            parts, max(triton.next_power_of_2(heads.group), _SMALLEST), _TILE, size,
        )  # fmt: skip
        out = torch.empty(sequences, heads.heads * dim, dtype=qkv.dtype, device=qkv.device)
        _attend_sum[(sequences, heads.heads)](part, largest, total, out, heads.heads, dim, parts, size)
        return out


@triton.jit
def _add_norm(x, residual, weight, out, width, eps, ADDS: tl.constexpr, SIZE: tl.constexpr):
    """One row: x += residual, rounded as it is kept; its RMSNorm."""
    at = tl.arange(0, SIZE)
    there = at < width
    row = tl.program_id(0).to(tl.int64) * width + at
    value = tl.load(x + row, mask=there, other=0.0)
    if ADDS:
        value = (value.to(tl.float32) + tl.load(residual + row, mask=there, other=0.0).to(tl.float32)).to(
            value.dtype
        )
        tl.store(x + row, value, mask=there)
    exact = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / width + eps)
    normed = exact * scale * tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row, normed.to(out.dtype.element_ty), mask=there)


@triton.jit
def _swiglu(gate_up, out, ffn, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    there = at < ffn
    gate = tl.load(gate_up + row * 2 * ffn + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * ffn + ffn + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * ffn + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _rotate_store(
    qkv, cos, sin, q_norm, k_norm, eps, slots, keys, values, heads, kv_heads, dim, block_tokens,
    ROTATES: tl.constexpr, NORMS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query stays where it is, a key or value goes to its slot."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, SIZE)
    there = at < dim
    half = dim // 2
    other = tl.where(at < half, at + half, at - half)
    row = qkv + (token * (heads + 2 * kv_heads) + head) * dim
    value = tl.load(row + at, mask=there, other=0.0)
    # Of each kind of head as many dims as it stores, here dim or none: masks in place of branches.
    query = tl.where(head < heads, dim, 0)
    kv_value = tl.where(head < heads + kv_heads, 0, dim)
    kv_key = dim - query - kv_value
    exact = value.to(tl.float32)
    turned = tl.load(row + other, mask=there, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(exact * exact, 0) / dim + eps)
        exact *= scale * _either(q_norm, k_norm, at, query, dim)
        turned *= scale * _either(q_norm, k_norm, other, query, dim)
    if ROTATES:
        turned = tl.where(at < half, -turned, turned)
        exact *= tl.load(cos + token * dim + at, mask=there, other=0.0)
        exact += turned * tl.load(sin + token * dim + at, mask=there, other=0.0)
    new = exact.to(value.dtype)
    tl.store(row + at, new, mask=at < query)
    slot = tl.load(slots + token)
    kv = tl.where(head < heads, 0, (head - heads) % kv_heads)
    place = ((slot // block_tokens * kv_heads + kv) * block_tokens + slot % block_tokens) * dim + at
    tl.store(keys + place, new, mask=at < kv_key)
    tl.store(values + place, value, mask=at < kv_value)


@triton.jit
def _either(q_norm, k_norm, at, query, dim):
    """The weights of a query's norm, or of a key's."""
    of_query = tl.load(q_norm + at, mask=at < query, other=0.0)
    return of_query + tl.load(k_norm + at, mask=at < dim - query, other=0.0)


@triton.jit
def _attend_part(
    qkv, keys, values, table, lengths, part, largest, total, scale, window, row_step, pages, heads, kv_heads, group,
    dim, block_tokens, PARTS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The heads of one kv head over one part of one sequence's keys: their softmax, not yet divided by its sum."""
    s, kv, index = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + s)
    first = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    share = tl.cdiv(tl.cdiv(length - first, PARTS), TILE) * TILE
    begin = first + index * share
    end = tl.minimum(begin + share, length)
    g, d = tl.arange(0, GROUP), tl.arange(0, SIZE)
    heads_there, dims_there = g < group, d < dim
    q_at = s * row_step + (kv * group + g)[:, None] * dim + d[None, :]
    q = tl.load(qkv + q_at, mask=heads_there[:, None] & dims_there[None, :], other=0.0)  # (GROUP, SIZE)
    most = tl.full((GROUP,), float("-inf"), tl.float32)
    mass = tl.zeros((GROUP,), tl.float32)
    out = tl.zeros((GROUP, SIZE), tl.float32)
    for start in range(begin, end, TILE):
        token = start + tl.arange(0, TILE)
        there = token < end
        block = tl.load(table + s * pages + token // block_tokens, mask=there, other=0)
        place = ((block * kv_heads + kv) * block_tokens + token % block_tokens)[:, None] * dim + d[None, :]
        seen = there[:, None] & dims_there[None, :]
        k = tl.load(keys + place, mask=seen, other=0.0)  # (TILE, SIZE)
        scores = tl.where(
            there[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf")
        )
        higher = tl.maximum(most, tl.max(scores, 1))
        shrink, weights = tl.exp(most - higher), tl.exp(scores - higher[:, None])
        v = tl.load(values + place, mask=seen, other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        mass = mass * shrink + tl.sum(weights, 1)
        most = higher
    row = (s * heads + kv * group + g) * PARTS + index
    tl.store(largest + row, most, mask=heads_there)
    tl.store(total + row, mass, mask=heads_there)
    tl.store(part + row[:, None] * dim + d[None, :], out, mask=heads_there[:, None] & dims_there[None, :])


@triton.jit
def _attend_sum(part, largest, total, out, heads, dim, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """One head of one sequence: its parts together."""
    row = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    p, d = tl.arange(0, PARTS), tl.arange(0, SIZE)
    there = d < dim
    most = tl.load(largest + row * PARTS + p)
    weight = tl.exp(most - tl.max(most, 0))
    mass = tl.sum(tl.load(total + row * PARTS + p) * weight, 0)
    parts = tl.load(part + (row * PARTS + p)[:, None] * dim + d[None, :], mask=there[None, :], other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / mass
    tl.store(out + row * dim + d, result.to(out.dtype.element_ty), mask=there)
