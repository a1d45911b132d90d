"""The operations in plain torch: what each one means, on any device, in fp32 or bf16.

N new tokens, S sequences, H heads, K kv heads, D head dim, E width, F ffn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from muster.model.attend import visible
from muster.model.rope import rotate
from muster.serve.engine.batch import Batch, PagedCache
from muster.serve.kernels.packing import Weights, mixed, stored_floats, unpack
from muster.serve.kernels.pages import from_rows, to_rows
from muster.serve.kernels.shape import Heads, QKNorm, Rotation, Trunk


class ReferenceLinear:
    """x (N, inputs) to (N, features). Quantised weights are kept as floats of the type that is computed in."""

    def __init__(
        self, weights: Weights, out: torch.dtype, compute: torch.dtype, device: torch.device
    ) -> None:
        plain = unpack(weights)
        self._rounds = plain.format in ("int8", "int4")
        self._weight = stored_floats(plain).to(device, compute)
        self._right, self._left = (
            None if part is None else part.to(device, torch.float32) for part in (plain.right, plain.left)
        )
        self._bias = None if plain.bias is None else plain.bias.to(device)
        self._out = out

    def __call__(self, x: Tensor) -> Tensor:
        if not self._rounds:
            product = F.linear(x, self._weight)
        elif self._right is None or self._left is None:
            product = self._rounded(x)
        else:
            parts = F.linear(x.float(), self._right)  # (N, R)
            product = self._rounded(x - parts @ self._right) + F.linear(parts, self._left)
        if self._bias is not None:
            product = product.float() + self._bias
        return product.to(self._out)

    def _rounded(self, x: Tensor) -> Tensor:
        whole, scale = round_rows(mixed(x))
        return F.linear(whole.to(self._weight.dtype), self._weight).float() * scale


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 activations in 8 bits: whole numbers -127..127 as fp32 and each row's scale (N, 1)."""
    largest = x.abs().amax(-1, keepdim=True)
    # A true division, which `127 / largest` is not: torch multiplies by the reciprocal there.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
    return torch.round(x * inverse), largest / 127


class Reference:
    """The operations on one device, computing in one type."""

    def __init__(self, compute: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.compute, self.device = compute, torch.device(device)

    def linear(self, weights: Weights, out: torch.dtype) -> ReferenceLinear:
        """A linear layer whose results have the type `out`."""
        return ReferenceLinear(weights, out, self.compute, self.device)

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """x (N, E) += residual, in place; its RMSNorm with weight (E,) fp32."""
        if residual is not None:
            x.add_(residual)
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up (N, F) of rows (N, 2 F) that hold both, gate first."""
        gate, up = gate_up.float().chunk(2, -1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def rotate_store(
        self, qkv: Tensor, heads: Heads, rotation: Rotation | None, norm: QKNorm | None, slots: Tensor,
        keys: Tensor, values: Tensor,
    ) -> None:  # fmt: skip
        """Norm and rotate the queries of qkv (N, (H + 2 K) D) in place, and the keys, which with the values go to
        `slots` (N,) of a layer's pages (blocks, K, block_tokens, D), or D + 4 where these are int8 (`pages.py`)."""
        q, k, v = (
            part.view(len(qkv), -1, heads.dim)  # (N, heads, D)
            for part in torch.split(
                qkv, [n * heads.dim for n in (heads.heads, heads.kv_heads, heads.kv_heads)], -1
            )
        )
        turned_q, turned_k = q.float(), k.float()
        if norm is not None:
            turned_q = F.rms_norm(turned_q, norm.q.shape, norm.q, norm.eps)
            turned_k = F.rms_norm(turned_k, norm.k.shape, norm.k, norm.eps)
        if rotation is not None:
            cos, sin = rotation[0][:, None], rotation[1][:, None]
            turned_q, turned_k = rotate(turned_q, cos, sin), rotate(turned_k, cos, sin)
        q.copy_(turned_q)
        block, offset = slots // keys.shape[2], slots % keys.shape[2]
        k = turned_k.to(qkv.dtype)
        if keys.dtype == torch.int8:
            k, v = to_rows(k), to_rows(v)
        keys[block, :, offset] = k
        values[block, :, offset] = v

    def attend(self, qkv: Tensor, heads: Heads, batch: Batch, keys: Tensor, values: Tensor) -> Tensor:
        """Attention (N, H D) of the queries in qkv over their sequences' pages, causal, within the window."""
        q = qkv[:, : heads.heads * heads.dim].view(-1, heads.kv_heads, heads.group, heads.dim)
        out = torch.empty_like(q)
        counts = batch.starts.diff()
        single = counts == 1
        rows = batch.starts[:-1][single]
        if len(rows):
            out[rows] = _attend_padded(
                q[rows][:, None], batch.table[single], batch.lengths[single], heads, keys, values
            )[:, 0]
        for s in (counts > 1).nonzero()[:, 0].tolist():
            new = slice(int(batch.starts[s]), int(batch.starts[s + 1]))
            table, length = batch.table[s : s + 1], batch.lengths[s : s + 1]
            out[new] = _attend_padded(q[new][None], table, length, heads, keys, values)[0]
        return out.flatten(1)

    def stack(self, trunk: Trunk) -> None:
        """None: there is nothing better than one operation after the other."""

    def check(self, batch: Batch, cache: PagedCache, vocabulary: int) -> None:
        """Nothing: torch checks its indices itself."""


def _attend_padded(
    q: Tensor, table: Tensor, lengths: Tensor, heads: Heads, keys: Tensor, values: Tensor
) -> Tensor:
    """(S, T, K, G, D) of equally many last tokens T of each sequence."""
    S, T, K, G, D = q.shape
    used = -(-int(lengths.max()) // keys.shape[2])
    # (S, P, K, block_tokens, D) -> (S, K, P * block_tokens, D)
    k, v = (pages[table[:, :used]].transpose(1, 2).flatten(2, 3) for pages in (keys, values))
    computed = q.dtype
    if keys.dtype == torch.int8:
        k, v, q = from_rows(k), from_rows(v), q.float()
    position = torch.arange(k.shape[2], device=q.device)
    queries = lengths[:, None] - T + torch.arange(T, device=q.device)  # (S, T)
    seen = visible(queries, position, heads.window)  # (S, T, P * block_tokens)
    # Pages hold anything behind a sequence's end, and what is no number spoils sums even where it is masked.
    stored = (position < lengths[:, None])[:, None, :, None]
    k, v = k.where(stored, 0), v.where(stored, 0)
    # The query heads of a kv head are rows: SDPA's own grouping is ten times as slow on a CPU.
    rows = q.permute(0, 2, 3, 1, 4).reshape(S, K, G * T, D)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=seen.repeat(1, G, 1)[:, None])
    return out.view(S, K, G, T, D).permute(0, 3, 1, 2, 4).to(computed)
