"""The operations in C++: checks what it is given, then hands pointers over. Releases the GIL while it computes.

A row's results are the same bits whatever other rows are in the call, for every operation here. See `reference.py`
for what each one means.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from muster.serve.engine.batch import Batch, PagedCache
from muster.serve.kernels.packing import IN_UNIT, Weights, pack
from muster.serve.kernels.pointers import FLOATS, checked, checked_fp32, checked_pages, pointer
from muster.serve.kernels.shape import Heads, Linear, QKNorm, Rotation, Trunk
from muster.serve.kernels.stack import NativeStack

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_SIGNATURES = {
    "linear_float": [_P] * 4 + [_I] * 7,
    "linear_int8": [_P] * 6 + [_I] * 7,
    "linear_int4": [_P] * 7 + [_I] * 7,
    "add_norm": [_P] * 4 + [_I] * 2 + [_D] + [_I] * 2,
    "swiglu": [_P] * 2 + [_I] * 4,
    "rotate_store": [_P] * 5 + [_D] + [_P] * 3 + [_I] * 8,
    "attend": [_P] * 7 + [_I] * 10,
    "layers": [_P] * 5,
    "logits": [_P] * 4,
    "check_batch": [_P] * 6 + [_I] * 7,
}
_BROKEN_RULES = (
    "", "a token is outside the vocabulary", "a slot is outside the cache", "starts do not cover the new tokens",
    "a sequence is longer than its table", "a table names a block that the cache does not have",
    "a wanted row is not there",
)  # fmt: skip


class _Library:
    """The C functions with their argument types."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, f"muster_{name}")
            function.argtypes = arguments
            function.restype = _I if name == "check_batch" else None
            setattr(self, name, function)

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:
        raise AttributeError(name)


class NativeLinear:
    """x (N, inputs) fp32 or bf16 to (N, features)."""

    def __init__(self, library: _Library, weights: Weights, out: torch.dtype) -> None:
        self._library, self.weights, self.out = library, pack(weights), out
        assert all(tensor.is_contiguous() for tensor in self.weights.tensors().values())
        w = self.weights
        self._pointers = [pointer(t) for t in (w.weight, w.scale, w.bias)]
        self._padded, self._factor, self._right = w.padded, pointer(w.factor), pointer(w.right)
        self._narrow_out = int(out == torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        w, (weight, scale, bias) = self.weights, self._pointers
        x = checked(x, w.inputs)
        out = x.new_empty((x.shape[0], w.features), dtype=self.out)
        threads, narrow = torch.get_num_threads(), int(x.dtype == torch.bfloat16)
        narrow_out, rows = self._narrow_out, x.shape[0]
        if w.format == "int8":
            self._library.linear_int8(
                x.data_ptr(), weight, scale, self._right, bias, out.data_ptr(), rows, w.inputs, self._padded,
                w.features, threads, narrow, narrow_out,
            )  # fmt: skip
        elif w.format == "int4":
            self._library.linear_int4(
                x.data_ptr(), weight, self._factor, scale, self._right, bias, out.data_ptr(), rows, w.inputs,
                self._padded, w.features, threads, narrow, narrow_out,
            )  # fmt: skip
        else:
            if x.dtype != w.weight.dtype:
                raise TypeError(f"activations are {x.dtype}, but the weights are {w.weight.dtype}")
            if odd := w.inputs % IN_UNIT[w.format]:
                x = F.pad(x, (0, odd))
            self._library.linear_float(
                x.data_ptr(), weight, bias, out.data_ptr(), rows, -(-w.inputs // IN_UNIT[w.format]),
                w.weight.shape[1], w.features, threads, narrow, narrow_out,
            )  # fmt: skip
        return out


class Native:
    """The operations on this CPU."""

    device = torch.device("cpu")

    def __init__(self, library: ctypes.CDLL, compute: torch.dtype) -> None:
        if compute not in FLOATS:
            raise TypeError(f"the kernels compute in fp32 and bf16, not in {compute}")
        self.compute = compute
        self._library = _Library(library)

    def linear(self, weights: Weights, out: torch.dtype) -> NativeLinear:
        return NativeLinear(self._library, weights, out)

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        rows, width = x.shape
        checked(x, width, exact=True)
        if residual is not None:
            assert residual.shape == x.shape
            assert residual.dtype == x.dtype
            residual = residual.contiguous()
        checked_fp32(weight, width)
        out = torch.empty_like(x)
        self._library.add_norm(
            x.data_ptr(), pointer(residual), weight.data_ptr(), out.data_ptr(), rows, width, eps,
            torch.get_num_threads(), x.dtype == torch.bfloat16,
        )  # fmt: skip
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        gate_up = checked(gate_up, width)
        out = torch.empty(rows, width // 2, dtype=gate_up.dtype)
        self._library.swiglu(
            gate_up.data_ptr(), out.data_ptr(), rows, width // 2, torch.get_num_threads(),
            gate_up.dtype == torch.bfloat16,
        )  # fmt: skip
        return out

    def rotate_store(
        self, qkv: Tensor, heads: Heads, rotation: Rotation | None, norm: QKNorm | None, slots: Tensor,
        keys: Tensor, values: Tensor,
    ) -> None:  # fmt: skip
        checked(qkv, heads.columns, exact=True)
        checked_pages(qkv.dtype, heads, keys, values)
        assert slots.dtype == torch.int64
        assert slots.shape == (len(qkv),)
        cos, sin = (None, None) if rotation is None else (part.contiguous() for part in rotation)
        for angles in (cos, sin):
            if angles is not None:
                checked_fp32(angles, heads.dim)
        if norm is not None:
            checked_fp32(norm.q, heads.dim)
            checked_fp32(norm.k, heads.dim)
        q, k = (norm.q, norm.k) if norm else (None, None)
        self._library.rotate_store(
            qkv.data_ptr(), pointer(cos), pointer(sin), pointer(q), pointer(k),
            norm.eps if norm else 0.0, slots.data_ptr(), keys.data_ptr(), values.data_ptr(), len(qkv), heads.heads,
            heads.kv_heads, heads.dim, keys.shape[2], torch.get_num_threads(), qkv.dtype == torch.bfloat16,
            keys.dtype == torch.int8,
        )  # fmt: skip

    def attend(self, qkv: Tensor, heads: Heads, batch: Batch, keys: Tensor, values: Tensor) -> Tensor:
        checked(qkv, heads.columns, exact=True)
        checked_pages(qkv.dtype, heads, keys, values)
        out = torch.empty(len(qkv), heads.heads * heads.dim, dtype=qkv.dtype)
        self._library.attend(
            qkv.data_ptr(), batch.starts.data_ptr(), batch.lengths.data_ptr(), batch.table.data_ptr(),
            keys.data_ptr(), values.data_ptr(), out.data_ptr(), len(batch.lengths), heads.heads, heads.kv_heads,
            heads.dim, keys.shape[2], batch.table.shape[1], heads.window or 0, torch.get_num_threads(),
            qkv.dtype == torch.bfloat16, keys.dtype == torch.int8,
        )  # fmt: skip
        return out

    def stack(self, trunk: Trunk) -> NativeStack | None:
        def weights(linear: Linear) -> Weights:
            assert isinstance(linear, NativeLinear)
            return linear.weights

        layers = [(block, [weights(one) for one in block.linears]) for block in trunk.blocks]
        head = None if trunk.head is None else weights(trunk.head)
        every = [one for _, linears in layers for one in linears] + ([] if head is None else [head])
        if any(one.format == "bf16" and one.inputs % IN_UNIT["bf16"] for one in every):
            return None  # their activations would have to be filled up
        return NativeStack(self._library, trunk, layers, head, self.compute)

    def check(self, batch: Batch, cache: PagedCache, vocabulary: int) -> None:
        """Refuse (IndexError) a batch that does not stay within its cache: the kernels take its word for it."""
        parts = (batch.tokens, batch.slots, batch.starts, batch.lengths, batch.table, batch.wanted)
        for part in parts:
            assert part.dtype == torch.int64
            assert part.is_contiguous()
        rows, sequences, pages = len(batch.tokens), len(batch.lengths), batch.table.shape[1]
        assert len(batch.slots) == len(batch.positions) == rows
        assert len(batch.starts) == len(batch.table) + 1 == sequences + 1
        broken = self._library.check_batch(
            *(part.data_ptr() for part in parts), rows, sequences, pages, len(batch.wanted), vocabulary,
            cache.keys[0].shape[0], cache.block_tokens,
        )  # fmt: skip
        if broken:
            raise IndexError(f"{_BROKEN_RULES[broken]}: the engine and its cache disagree")
