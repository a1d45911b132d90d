"""All layers of a network in one call of C++ (`cpp/layers.cpp`), whose structures are filled in here.

What does not change from step to step is checked once: weights when the stack is made, pages when it first meets a
cache. A step then checks what it is given once, and not once for each operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from muster.serve.engine.batch import Batch, PagedCache
from muster.serve.kernels.packing import Weights
from muster.serve.kernels.pointers import checked, checked_fp32, checked_pages, pointer
from muster.serve.kernels.shape import Block, Rotation

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_FORMATS = {"fp32": 0, "bf16": 0, "int8": 1, "int4": 2}


class _Linear(ctypes.Structure):
    _fields_ = (
        ("format", _I), ("weight", _P), ("scale", _P), ("bias", _P), ("inputs", _I), ("padded", _I),
        ("features", _I), ("group", _I),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _P), ("mlp_norm", _P), ("q_norm", _P), ("k_norm", _P), ("eps", _D), ("qk_eps", _D),
        ("qkv", _Linear), ("o", _Linear), ("gate_up", _Linear), ("down", _Linear),
    )  # fmt: skip


class _Stack(ctypes.Structure):
    _fields_ = (
        ("layers", _P), ("count", _I), ("width", _I), ("heads", _I), ("kv_heads", _I), ("dim", _I), ("window", _I),
        ("narrow", _I),
    )  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (("keys", _P), ("values", _P), ("block_tokens", _I), ("quantized", _I))


class NativeStack:
    """Layers, each with the packed weights of its qkv, o, gate and up, and down, in that order."""

    def __init__(
        self,
        function: Callable[..., None],
        layers: Sequence[tuple[Block, Sequence[Weights]]],
        compute: torch.dtype,
    ) -> None:
        first = layers[0][0]
        self._function, self._kept, self._compute = function, layers, compute
        self._heads, self._width = first.heads, layers[0][1][0].inputs
        self._layers = (_Layer * len(layers))(*(self._layer(*layer) for layer in layers))
        self._stack = _Stack(
            ctypes.addressof(self._layers), len(layers), self._width, first.heads.heads, first.heads.kv_heads,
            first.heads.dim, first.heads.window or 0, compute == torch.bfloat16,
        )  # fmt: skip
        self._cache: PagedCache | None = None

    def __call__(self, x: Tensor, rotation: Rotation | None, batch: Batch, cache: PagedCache) -> Tensor:
        checked(x, self._width, exact=True)
        rows, slots, table = len(x), batch.slots, batch.table
        if x.dtype != self._compute or slots.shape != (rows,) or slots.dtype != torch.int64:
            raise TypeError(f"expected {self._compute} and a slot a row, got {x.dtype} and {slots.shape}")
        cos, sin = (None, None) if rotation is None else rotation
        for angles in (cos, sin):
            if angles is not None:
                checked_fp32(angles, self._heads.dim)
                assert len(angles) == rows
        if cache is not self._cache:
            self._meet(cache)
        residual = torch.empty_like(x)
        self._function(
            ctypes.addressof(self._stack), ctypes.addressof(self._pages), x.data_ptr(), residual.data_ptr(),
            pointer(cos), pointer(sin), slots.data_ptr(), batch.starts.data_ptr(), batch.lengths.data_ptr(),
            table.data_ptr(), rows, len(table), table.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return residual

    def _layer(self, block: Block, weights: Sequence[Weights]) -> _Layer:
        """What C++ reads of one; TypeError where its sizes are not those of the others, or do not fit each other."""
        heads, norm, (_, _, _, down) = self._heads, block.qk_norm, weights
        shapes = [(one.inputs, one.features) for one in weights]
        fitting = [
            (self._width, heads.columns), (heads.heads * heads.dim, self._width), (self._width, 2 * down.inputs),
            (down.inputs, self._width),
        ]  # fmt: skip
        if shapes != fitting or block.heads != heads:
            raise TypeError(f"matrices of {shapes} are no layer of width {self._width} with {heads}")
        for weight in (block.attention_norm, block.mlp_norm):
            checked_fp32(weight, self._width)
        for weight in () if norm is None else (norm.q, norm.k):
            checked_fp32(weight, heads.dim)
        q, k, qk_eps = (None, None, 0.0) if norm is None else (norm.q, norm.k, norm.eps)
        return _Layer(
            pointer(block.attention_norm), pointer(block.mlp_norm), pointer(q), pointer(k), block.eps, qk_eps,
            *map(self._linear, weights),
        )  # fmt: skip

    def _linear(self, weights: Weights) -> _Linear:
        if weights.weight.is_floating_point() and weights.weight.dtype != self._compute:
            raise TypeError(f"activations are {self._compute}, but the weights are {weights.weight.dtype}")
        return _Linear(
            _FORMATS[weights.format], pointer(weights.weight), pointer(weights.scale), pointer(weights.bias),
            weights.inputs, weights.padded, weights.features, weights.group,
        )  # fmt: skip

    def _meet(self, cache: PagedCache) -> None:
        """Note where a cache's pages are; they stay there."""
        assert len(cache.keys) == len(cache.values) == len(self._layers)
        for keys, values in zip(cache.keys, cache.values, strict=True):
            checked_pages(self._compute, self._heads, keys, values)
            assert keys.shape == cache.keys[0].shape
        self._addresses = [(_P * len(pages))(*map(pointer, pages)) for pages in (cache.keys, cache.values)]
        self._pages = _Cache(
            *map(ctypes.addressof, self._addresses), cache.block_tokens, cache.keys[0].dtype == torch.int8
        )
        self._cache = cache
