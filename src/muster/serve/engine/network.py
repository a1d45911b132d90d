"""A model as the engine computes it: one pass over a ragged batch, keys and values in pages.

The math is `muster.model.transformer`'s, with its parameters; what differs is the shape of the work. The operations
come from outside (`muster.serve.kernels`), so the same class runs in C++ on a CPU and in torch anywhere.
N new tokens, W wanted rows, H heads, K kv heads, D head dim, E width, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from muster.model.moe import MoE
from muster.model.rope import rotation_at
from muster.model.transformer import Transformer
from muster.serve.adapters import Adapter
from muster.serve.engine.adapted import Adaptation, AdaptedLinear, Linear, Spans
from muster.serve.engine.batch import Batch, PagedCache, carry_out
from muster.serve.engine.blocks import Chore
from muster.serve.engine.hugepages import huge_bytes
from muster.serve.engine.packed import PackedModel, pack_model
from muster.serve.kernels.ops import Kernels, Stack, choose_kernels
from muster.serve.kernels.packing import Format
from muster.serve.kernels.shape import KV, Block, Heads, QKNorm, Rotation, Trunk, row_bytes

Total = Callable[[Tensor], Tensor]
"""The sum of x over the ranks that a layer is divided over."""


def same(x: Tensor) -> Tensor:
    """x itself: the sum over one rank."""
    return x


class TransformerNetwork:
    """A packed model behind the engine's `Network`; or a part of one, which `ranks.py` joins with the others.

    `total` sums over the ranks that the layers are divided over; it may do so in place. `adapters` are the whole
    model's.
    """

    def __init__(
        self, model: PackedModel, kernels: Kernels, total: Total = same, adapters: Sequence[Adapter] = ()
    ) -> None:
        spec = model.spec
        self.part, self.spec, self.compute, self.device = model.part, spec, model.compute, kernels.device
        self._kernels, self._total = kernels, total
        embed, positions = model.tensors.get("embed"), model.tensors.get("positions")
        self._embed = None if embed is None else embed.to(kernels.device)
        self._positions = None if positions is None else positions.to(kernels.device)
        adaptation = Adaptation(adapters, model.part, kernels)
        self._layers = [_Layer(model, kernels, layer, total, adaptation) for layer in model.part.layers]
        self._norm: _Norm | None = None
        self._head: Linear | None = None
        if "head" in model.linears:
            self._norm = _Norm(model, kernels, "norm")
            self._head = kernels.linear(model.linears["head"], torch.float32)
        self._stack = self._stacked()

    @classmethod
    def of(
        cls, model: Transformer, format: Format, device: torch.device | str = "cpu"
    ) -> tuple[TransformerNetwork, str]:
        """A model's network in a format with the fastest operations here, and which those are and why."""
        kernels, reason = choose_kernels(torch.float32 if format == "fp32" else torch.bfloat16, device)
        return cls(pack_model(model, format), kernels), reason

    def new_cache(self, blocks: int, block_tokens: int, kv: KV | None = None) -> PagedCache:
        """An empty cache for this network, in a format."""
        dtype = self.compute if kv is None else torch.int8
        row = row_bytes(self.spec.head_dim, self.compute.itemsize, kv) // dtype.itemsize
        shape = (blocks, self.spec.kv_heads, block_tokens, row)

        def pages() -> Tensor:
            if self.device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=self.device)
            return huge_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

        keys, values = (tuple(pages() for _ in self._layers) for _ in range(2))
        return PagedCache(keys=keys, values=values)

    def prepare(self, chores: Sequence[Chore], cache: PagedCache) -> None:
        carry_out(chores, cache)

    def logits(self, batch: Batch, cache: PagedCache) -> Tensor:
        """fp32 logits (W, V) of the wanted rows, after writing the batch's keys and values into the cache."""
        if self._stack is not None and self._stack.whole and not len(batch.adapted):
            self.check(batch, cache)
            return self._stack.logits(batch, cache)
        with torch.inference_mode():
            return self.scored(self.last_hidden(batch, cache))

    @torch.inference_mode()
    def last_hidden(self, batch: Batch, cache: PagedCache) -> Tensor:
        """The last hidden states (W, E) of the wanted rows, after the final norm."""
        batch = batch.to(self.device)
        self.check(batch, cache)
        return self.final(batch, *self.through(batch, cache, self.embedded(batch)))

    def check(self, batch: Batch, cache: PagedCache) -> None:
        """Raise IndexError for a batch that does not stay within its cache."""
        self._kernels.check(batch, cache, self.part.whole.vocab)

    def embedded(self, batch: Batch) -> Tensor:
        """What the first layer is given, (N, E)."""
        assert self._embed is not None
        own = self.part.tokens
        if len(own) == self.part.whole.vocab:
            x = F.embedding(batch.tokens, self._embed)
        else:
            index = batch.tokens - own.start
            foreign = (index < 0) | (index >= len(own))
            rows = F.embedding(index.masked_fill(foreign, 0), self._embed)
            x = self._total(rows.masked_fill_(foreign[:, None], 0))
        return x if self._positions is None else x + F.embedding(batch.positions, self._positions)

    def through(self, batch: Batch, cache: PagedCache, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, E) through the layers: what comes out of the last one, and what is still to be added to it."""
        if self._stack is not None and not len(batch.adapted):
            return x, self._stack.through(batch, cache, x)
        rotation = rotation_at(self.spec, batch.positions) if self.spec.positions == "rope" else None
        spans = [(adapter, slice(first, end)) for adapter, first, end in batch.adapted.tolist()]
        residual: Tensor | None = None  # added to x by the next norm, which reads both anyhow
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            residual = layer(x, residual, rotation, batch, spans, keys, values)
        assert residual is not None
        return x, residual

    def final(self, batch: Batch, x: Tensor, residual: Tensor) -> Tensor:
        """The last hidden states (W, E) of the wanted rows, from what `through` returns."""
        assert self._norm is not None
        if len(batch.wanted) < len(x):
            x, residual = x[batch.wanted], residual[batch.wanted]
        return self._norm(x, residual)

    def scored(self, hidden: Tensor) -> Tensor:
        """fp32 logits of last hidden states (W, E), of the tokens that are here."""
        assert self._head is not None
        return self._head(hidden)

    def _stacked(self) -> Stack | None:
        """All in one call, where nothing of ours comes between a layer's operations."""
        blocks = [block for layer in self._layers if (block := layer.block()) is not None]
        if self.part.ranks > 1 or self.spec.positions != "rope" or len(blocks) < len(self._layers):
            return None
        trunk = Trunk(
            spec=self.spec,
            heads=self._layers[0].heads,
            blocks=blocks,
            embed=self._embed,
            norm=None if self._norm is None else self._norm.weight,
            head=self._head,
        )
        return self._kernels.stack(trunk)


class _Layer:
    """Attention and feed-forward; takes x and what is still to be added to it, and returns the next such."""

    def __init__(
        self, model: PackedModel, kernels: Kernels, layer: int, total: Total, adaptation: Adaptation
    ) -> None:
        spec, at = model.spec, f"layers.{layer}"
        self._kernels, self._total = kernels, total
        self.heads = Heads(heads=spec.heads, kv_heads=spec.kv_heads, dim=spec.head_dim, window=spec.window)
        self._qk_norm: QKNorm | None = None
        if spec.qk_norm:
            q, k = (model.tensors[f"{at}.{name}_norm.weight"].to(kernels.device) for name in "qk")
            self._qk_norm = QKNorm(q=q, k=k, eps=spec.norm_eps)
        self._attention_norm = _Norm(model, kernels, f"{at}.attention_norm")
        self._mlp_norm = _Norm(model, kernels, f"{at}.mlp_norm")

        def linear(name: str, fused: dict[str, int]) -> AdaptedLinear:
            """The matrix that was made from those, of so many features each."""
            base = kernels.linear(model.linears[f"{at}.{name}"], model.compute)
            return adaptation.of(base, {f"{at}.{one}.weight": features for one, features in fused.items()})

        wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self._qkv = linear("qkv", {"attention.q": wide, "attention.k": narrow, "attention.v": narrow})
        self._o = linear("o", {"attention.o": spec.width})
        self._mlp: Callable[[Tensor, Spans], Tensor]
        if spec.experts:
            experts = _experts(model, kernels, at)
            self._mlp = lambda x, _: experts(x)
        else:
            gated = spec.mlp == "swiglu"
            up = linear("gate_up", ({"mlp.gate": spec.ffn} if gated else {}) | {"mlp.up": spec.ffn})
            self._mlp = _MLP(kernels, gated, up, linear("down", {"mlp.down": spec.width}))

    def __call__(
        self, x: Tensor, residual: Tensor | None, rotation: Rotation | None, batch: Batch, spans: Spans,
        keys: Tensor, values: Tensor,
    ) -> Tensor:  # fmt: skip
        qkv = self._qkv(self._attention_norm(x, residual), spans)  # (N, (H + 2 K) D)
        self._kernels.rotate_store(qkv, self.heads, rotation, self._qk_norm, batch.slots, keys, values)
        attended = self._kernels.attend(qkv, self.heads, batch, keys, values)
        residual = self._total(self._o(attended, spans))
        return self._total(self._mlp(self._mlp_norm(x, residual), spans))

    def block(self) -> Block | None:
        """The same as data, without adapters; None where norms or feed-forward are of another kind."""
        mlp, attention_norm, mlp_norm = self._mlp, self._attention_norm, self._mlp_norm
        rms = attention_norm.bias is None and mlp_norm.bias is None
        if not rms or not isinstance(mlp, _MLP) or not mlp.gated:
            return None
        return Block(
            attention_norm=attention_norm.weight,
            mlp_norm=mlp_norm.weight,
            qk_norm=self._qk_norm,
            qkv=self._qkv.base,
            o=self._o.base,
            gate_up=mlp.up.base,
            down=mlp.down.base,
        )


class _MLP:
    """down(activation(up x)), where `up` may be gate and up."""

    def __init__(self, kernels: Kernels, gated: bool, up: AdaptedLinear, down: AdaptedLinear) -> None:
        self.gated, self.up, self.down = gated, up, down
        self._activation: Linear = kernels.swiglu if gated else partial(F.gelu, approximate="tanh")

    def __call__(self, x: Tensor, spans: Spans) -> Tensor:
        return self.down(self._activation(self.up(x, spans)), spans)


class _Norm:
    """x (N, E) += residual in place, and the norm of that."""

    def __init__(self, model: PackedModel, kernels: Kernels, name: str) -> None:
        self._kernels, self.eps = kernels, model.spec.norm_eps
        self.weight = model.tensors[f"{name}.weight"].to(kernels.device)
        bias = model.tensors.get(f"{name}.bias")
        self.bias = None if bias is None else bias.to(kernels.device)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.bias is None:
            return self._kernels.add_norm(x, residual, self.weight, self.eps)
        if residual is not None:
            x.add_(residual)
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


def _experts(model: PackedModel, kernels: Kernels, at: str) -> Linear:
    """The model's own module: its experts are not quantised."""
    with torch.device("meta"):
        moe = MoE(model.spec)
    prefix = f"{at}.moe."
    own = {
        name.removeprefix(prefix): tensor.to(kernels.device)
        for name, tensor in model.tensors.items()
        if name.startswith(prefix)
    }
    moe.load_state_dict(own, assign=True)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = moe(x[None])[0]
        return out

    return forward
