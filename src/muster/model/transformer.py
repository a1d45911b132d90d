"""The decoder-only transformer that every family is a case of: plain modules a student could read.

Shapes in comments: B batch, T tokens, H heads, K kv heads, D head dim, E embed, F ffn, V vocab.
Parameter names are the same on every layout and in every checkpoint. Distribution is applied
from outside (`parallel/apply.py`); nothing here knows of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muster.model.attend import Attend, attend, attend_cached
from muster.model.cache import CacheRows
from muster.model.loss import CrossEntropy, linear_cross_entropy
from muster.model.mlp import MLP
from muster.model.moe import MoE
from muster.model.rope import rotate, rotation, rotation_at
from muster.model.spec import TransformerSpec

Rotation = tuple[Tensor, Tensor]
Value = Callable[[str, torch.Size], Tensor]
"""A parameter's whole value, by its name and shape."""

_TO_RESIDUAL = ("attention.o.weight", "mlp.down.weight", "mlp.shared.down.weight", "mlp.experts.down")


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last dim."""

    def __init__(self, spec: TransformerSpec, size: int) -> None:
        super().__init__()
        self.eps = spec.norm_eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if spec.norm == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023)."""

    def __init__(self, spec: TransformerSpec, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, spec.head_dim, spec.window
        self.q = nn.Linear(spec.width, spec.heads * spec.head_dim, bias=spec.qkv_bias)
        self.k = nn.Linear(spec.width, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.v = nn.Linear(spec.width, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.o = nn.Linear(spec.heads * spec.head_dim, spec.width, bias=spec.out_bias)
        self.q_norm = Norm(spec, spec.head_dim) if spec.qk_norm else None
        self.k_norm = Norm(spec, spec.head_dim) if spec.qk_norm else None
        self.attend: Attend = attend

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        documents: Tensor | None,
        cache: CacheRows | None,
        positions: Tensor | None,
    ) -> Tensor:
        q = self._heads(self.q(x), self.q_norm, rotation)  # (B, H, T, D)
        k = self._heads(self.k(x), self.k_norm, rotation)  # (B, K, T, D)
        v = self._heads(self.v(x), None, None)
        if cache is None:
            out = self.attend(q, k, v, documents=documents, window=self.window)
        else:
            assert positions is not None
            k, v = cache.append(self.layer, k, v)
            out = attend_cached(q, k, v, positions, window=self.window)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))  # (B, T, H*D) -> (B, T, E)
        return projected

    def _heads(self, x: Tensor, norm: Norm | None, rotation: Rotation | None) -> Tensor:
        x = x.view(*x.shape[:-1], -1, self.head_dim)  # (B, T, heads, D)
        if norm is not None:
            x = norm(x)
        x = x.transpose(1, 2)  # (B, heads, T, D)
        return x if rotation is None else rotate(x, *rotation)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, spec: TransformerSpec, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(spec, spec.width)
        self.attention = Attention(spec, layer)
        self.mlp_norm = Norm(spec, spec.width)
        self.mlp = MoE(spec) if spec.experts else MLP(spec, spec.ffn)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        documents: Tensor | None,
        cache: CacheRows | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, documents, cache, positions)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Transformer(nn.Module):
    """Token ids to logits, or to a summed loss; or, with `layers`, a stretch of that way.

    A stretch has the names and values that the whole model has. The one with the first layer begins with the
    embedding, the one with the last layer ends with norm and head; the others turn hidden states into hidden
    states. A tied embedding is in both ends: looked up in the first, multiplied with in the last.
    """

    def __init__(self, spec: TransformerSpec, layers: range | None = None) -> None:
        super().__init__()
        layers = range(spec.layers) if layers is None else layers
        self.spec = spec
        self.is_first, self.is_last = layers.start == 0, layers.stop == spec.layers
        has_embed = self.is_first or (self.is_last and spec.tied)
        has_positions = self.is_first and spec.positions == "learned"
        has_head = self.is_last and not spec.tied
        self.embed = nn.Embedding(spec.vocab, spec.width) if has_embed else None
        self.positions = nn.Embedding(spec.context, spec.width) if has_positions else None
        self.layers = nn.ModuleDict({str(layer): Block(spec, layer) for layer in layers})
        self.norm = Norm(spec, spec.width) if self.is_last else None
        self.head = nn.Linear(spec.width, spec.vocab, bias=False) if has_head else None
        self.cross_entropy: CrossEntropy = linear_cross_entropy

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CacheRows | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for tokens (B, T); with targets (B, T) the summed cross entropy, fp32.

        A stretch that does not begin the model takes hidden states (B, T, E) in place of tokens; one that does
        not end it returns them.

        documents (B, T) int: non-decreasing ids along a row; attention stays within one. Targets of -100
        are not scored. positions (B, T): where the tokens stand in their sequence or document, if not at
        0..T-1. With a cache, each row's tokens continue the sequence in its slot.
        """
        length = tokens.shape[1]
        if cache is not None:
            positions = cache.starts[:, None] + torch.arange(length, device=tokens.device)  # (B, T)
        elif positions is None and documents is not None and self.positions is not None:
            positions = positions_in_document(documents)
        x = self._embedded(tokens, positions) if self.is_first else tokens  # (B, T, E)
        rotation = self._rotation(length, positions, tokens.device) if self.spec.positions == "rope" else None
        for block in self.blocks:
            x = block(x, rotation, documents, cache, positions)
        if cache is not None:
            cache.advance(length)
        return self._scored(x, targets) if self.is_last else x

    def _embedded(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        assert self.embed is not None
        x: Tensor = self.embed(tokens)  # (B, T, E)
        if self.positions is not None:
            index = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
            x = x + self.positions(index)
        return x

    def _scored(self, x: Tensor, targets: Tensor | None) -> Tensor:
        head = self.embed if self.head is None else self.head
        assert self.norm is not None
        assert head is not None
        x = self.norm(x)
        if targets is None:
            return F.linear(x, head.weight)
        return self.cross_entropy(x.flatten(0, 1), head.weight, targets.flatten())

    @property
    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return [block for block in self.layers.values() if isinstance(block, Block)]

    def init_weights(self, seed: int) -> None:
        """Fill every tensor with its initial value; independent of order and of the other tensors."""
        with torch.no_grad():
            for name, tensor in named_tensors(self):
                tensor.copy_(initial_value(name, tensor.shape, self.spec, seed))

    def _rotation(self, length: int, positions: Tensor | None, device: torch.device) -> Rotation:
        # Rotation depends on distances only, so documents need no positions of their own.
        if positions is None:
            return rotation(self.spec, length, device)
        cos, sin = rotation_at(self.spec, positions)
        return cos[:, None], sin[:, None]  # (B, 1, T, D)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that makes up a model, by name: parameters, and what balances routers without being trained."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def initial_value(name: str, shape: torch.Size, spec: TransformerSpec, seed: int) -> Tensor:
    """A parameter's initial value in fp32, from its name and the seed alone, so that any rank can make any.

    GPT-2's scheme (Radford et al. 2019): normal with 0.02, the matrices that write to the residual
    stream divided by sqrt(2 L).
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    std = 0.02
    if name.endswith(_TO_RESIDUAL):
        std /= math.sqrt(2 * spec.layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def parameter_names(spec: TransformerSpec) -> list[str]:
    """The names of all parameters, in order."""
    with torch.device("meta"):
        return [name for name, _ in Transformer(spec).named_parameters()]


@torch.no_grad()
def materialize(
    spec: TransformerSpec,
    value: Value,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A transformer with given values, asked for one at a time, so that memory holds the model once."""
    with torch.device("meta"):
        model = Transformer(spec)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # and not the buffers, which are fp32 for a reason
    model = model.to_empty(device=device)
    for name, tensor in named_tensors(model):
        tensor.copy_(value(name, tensor.shape))
    return model


def positions_in_document(documents: Tensor) -> Tensor:
    """Positions (B, T) that start from 0 in each document, for documents (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - index.where(starts, 0).cummax(dim=1).values
