"""A network's layers in one call of C++, and all of a network that has embedding and head; `cpp/layers.cpp` computes.

What does not change from step to step is checked once: weights when the stack is made, pages when it first meets a
cache. A step then checks what it is given once, and not once for each operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from muster.model.rope import rotation_at
from muster.serve.engine.batch import Batch, PagedCache
from muster.serve.kernels.packing import Weights
from muster.serve.kernels.pointers import checked, checked_fp32, checked_pages, pointer
from muster.serve.kernels.shape import Block, Trunk

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_FORMATS = {"fp32": 0, "bf16": 0, "int8": 1, "int4": 2}
_FEWEST_POSITIONS = 1024


class _Linear(ctypes.Structure):
    _fields_ = (
        ("format", _I), ("weight", _P), ("factor", _P), ("scale", _P), ("right", _P), ("bias", _P),
        ("inputs", _I), ("padded", _I), ("features", _I),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _P), ("mlp_norm", _P), ("q_norm", _P), ("k_norm", _P), ("eps", _D), ("qk_eps", _D),
        ("qkv", _Linear), ("o", _Linear), ("gate_up", _Linear), ("down", _Linear),
    )  # fmt: skip


class _Stack(ctypes.Structure):
    _fields_ = (
        ("layers", _P), ("count", _I), ("width", _I), ("heads", _I), ("kv_heads", _I), ("dim", _I), ("window", _I),
        ("narrow", _I), ("cos", _P), ("sin", _P), ("embed", _P), ("norm", _P), ("eps", _D), ("head", _Linear),
    )  # fmt: skip


class _Cache(ctypes.Structure):
    _fields_ = (("keys", _P), ("values", _P), ("block_tokens", _I), ("quantized", _I))


class _Batch(ctypes.Structure):
    _fields_ = (
        ("tokens", _P), ("slots", _P), ("starts", _P), ("lengths", _P), ("table", _P), ("wanted", _P), ("rows", _I),
        ("sequences", _I), ("table_width", _I), ("wanted_rows", _I), ("threads", _I),
    )  # fmt: skip


class Functions(Protocol):
    """The two of `layers.cpp`."""

    @property
    def layers(self) -> Callable[..., Any]: ...

    @property
    def logits(self) -> Callable[..., Any]: ...


class NativeStack:
    """A trunk, given with the packed weights of its blocks' linear layers and of its head."""

    def __init__(
        self,
        functions: Functions,
        trunk: Trunk,
        layers: Sequence[tuple[Block, Sequence[Weights]]],
        head: Weights | None,
        compute: torch.dtype,
    ) -> None:
        spec, heads = trunk.spec, trunk.heads
        self.whole = trunk.embed is not None and head is not None
        self._functions, self._spec, self._heads, self._compute = functions, spec, heads, compute
        self._kept = trunk, layers, head
        """Whose memory the structures point to."""
        self._layers = (_Layer * len(layers))(*(self._layer(*layer) for layer in layers))
        self._stack = _Stack(
            ctypes.addressof(self._layers), len(layers), spec.width, heads.heads, heads.kv_heads, heads.dim,
            heads.window or 0, compute == torch.bfloat16, eps=spec.norm_eps,
        )  # fmt: skip
        if trunk.embed is not None and trunk.norm is not None and head is not None:
            shapes = [tuple(trunk.embed.shape), (head.features, head.inputs)]
            if shapes != [(spec.vocab, spec.width)] * 2 or trunk.embed.dtype != compute:
                raise TypeError(f"embedding and head of {shapes} are not those of {spec.vocab} tokens")
            checked_fp32(trunk.norm, spec.width)
            embed = checked(trunk.embed, spec.width, exact=True)
            self._stack.embed, self._stack.norm = embed.data_ptr(), trunk.norm.data_ptr()
            self._stack.head, self._vocab = self._linear(head), spec.vocab
        self._positions = 0
        """Of which there are angles."""
        self._cache: PagedCache | None = None

    def through(self, batch: Batch, cache: PagedCache, x: Tensor) -> Tensor:
        checked(x, self._spec.width, exact=True)
        if x.dtype != self._compute or len(x) != len(batch.slots):
            raise TypeError(f"expected {len(batch.slots)} rows of {self._compute}, got {len(x)} of {x.dtype}")
        residual = torch.empty_like(x)
        numbers = self._numbers(batch, cache)
        self._functions.layers(
            ctypes.addressof(self._stack), ctypes.addressof(self._pages), ctypes.addressof(numbers), x.data_ptr(),
            residual.data_ptr(),
        )  # fmt: skip
        return residual

    def logits(self, batch: Batch, cache: PagedCache) -> Tensor:
        assert self.whole
        out = torch.empty(len(batch.wanted), self._vocab)
        numbers = self._numbers(batch, cache)
        self._functions.logits(
            ctypes.addressof(self._stack),
            ctypes.addressof(self._pages),
            ctypes.addressof(numbers),
            out.data_ptr(),
        )
        return out

    def _numbers(self, batch: Batch, cache: PagedCache) -> _Batch:
        """A batch as C++ reads it, over a cache that it knows and with angles for all positions there may be."""
        if cache is not self._cache:
            self._meet(cache)
        rows, (sequences, pages) = len(batch.slots), batch.table.shape
        if pages * self._pages.block_tokens > self._positions:
            self._reach(pages * self._pages.block_tokens)
        return _Batch(
            batch.tokens.data_ptr(), batch.slots.data_ptr(), batch.starts.data_ptr(), batch.lengths.data_ptr(),
            batch.table.data_ptr(), batch.wanted.data_ptr(), rows, sequences, pages, len(batch.wanted),
            torch.get_num_threads(),
        )  # fmt: skip

    def _reach(self, positions: int) -> None:
        """Have angles of so many positions, or up to twice as many. One's are 4 D bytes: no more than what one layer's
        cache holds of a token in bf16."""
        self._positions = max(_FEWEST_POSITIONS, 1 << (positions - 1).bit_length())
        half = self._heads.dim // 2  # the other is the same
        angles = rotation_at(self._spec, torch.arange(self._positions))
        self._angles = [part[:, :half].contiguous() for part in angles]
        self._stack.cos, self._stack.sin = (part.data_ptr() for part in self._angles)

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

    def _layer(self, block: Block, weights: Sequence[Weights]) -> _Layer:
        """What C++ reads of one; TypeError where its sizes do not fit."""
        width, heads, norm = self._spec.width, self._heads, block.qk_norm
        ffn = weights[-1].inputs
        shapes = [(one.inputs, one.features) for one in weights]
        fitting = [(width, heads.columns), (heads.heads * heads.dim, width), (width, 2 * ffn), (ffn, width)]
        if shapes != fitting:
            raise TypeError(f"matrices of {shapes} are no layer of width {width} with {heads}")
        for weight in (block.attention_norm, block.mlp_norm):
            checked_fp32(weight, width)
        for weight in () if norm is None else (norm.q, norm.k):
            checked_fp32(weight, heads.dim)
        q, k, qk_eps = (None, None, 0.0) if norm is None else (norm.q, norm.k, norm.eps)
        return _Layer(
            pointer(block.attention_norm), pointer(block.mlp_norm), pointer(q), pointer(k), self._spec.norm_eps,
            qk_eps, *map(self._linear, weights),
        )  # fmt: skip

    def _linear(self, weights: Weights) -> _Linear:
        if weights.weight.is_floating_point() and weights.weight.dtype != self._compute:
            raise TypeError(f"activations are {self._compute}, but the weights are {weights.weight.dtype}")
        return _Linear(
            _FORMATS[weights.format], pointer(weights.weight), pointer(weights.factor), pointer(weights.scale),
            pointer(weights.right), pointer(weights.bias), weights.inputs, weights.padded,
            weights.features,
        )  # fmt: skip
