"""A network in plain torch, on any device: the training model's own modules over the paged cache."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from muster.model.attend import visible
from muster.model.rope import rotation_at
from muster.model.transformer import Attention, Rotation, Transformer
from muster.serve.engine.batch import Batch, PagedCache


class PlainNetwork:
    """A `Network` of a whole `Transformer`."""

    def __init__(self, model: Transformer) -> None:
        self._model = model.eval()

    def logits(self, batch: Batch, cache: PagedCache) -> Tensor:
        model = self._model
        assert model.embed is not None
        assert model.norm is not None
        x = model.embed(batch.tokens)[None]  # (1, N, E)
        rotation: Rotation | None = None
        if model.positions is not None:
            x = x + model.positions(batch.positions)
        else:
            rotation = rotation_at(model.spec, batch.positions)  # (N, D)
        for block in model.blocks:
            x = x + _attention(block.attention, block.attention_norm(x), rotation, batch, cache)
            x = x + block.mlp(block.mlp_norm(x))
        head = model.embed if model.head is None else model.head
        return F.linear(model.norm(x[0, batch.wanted]), head.weight).float()


def _attention(
    layer: Attention, x: Tensor, rotation: Rotation | None, batch: Batch, cache: PagedCache
) -> Tensor:
    q = layer._heads(layer.q(x), layer.q_norm, rotation)[0]  # (H, N, D)
    k = layer._heads(layer.k(x), layer.k_norm, rotation)[0]  # (K, N, D)
    v = layer._heads(layer.v(x), None, None)[0]
    keys, values = cache.keys[layer.layer], cache.values[layer.layer]
    block, offset = batch.slots // cache.block_tokens, batch.slots % cache.block_tokens
    keys[block, :, offset] = k.transpose(0, 1)  # indexing around K gives (N, K, D)
    values[block, :, offset] = v.transpose(0, 1)
    out = torch.empty_like(q.transpose(0, 1))  # (N, H, D)
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    for row, (first, last) in enumerate(pairwise(starts)):
        seen = slice(lengths[row])
        pages = batch.table[row, : -(-lengths[row] // cache.block_tokens)]
        k = keys[pages].transpose(0, 1).flatten(1, 2)[:, seen]  # (P, K, B, D) -> (K, S, D)
        v = values[pages].transpose(0, 1).flatten(1, 2)[:, seen]
        new, heads = last - first, q.shape[0]
        mine = q[:, first:last].reshape(k.shape[0], -1, q.shape[2])  # (K, H/K * T, D)
        mask = visible(batch.positions[first:last], torch.arange(lengths[row], device=q.device), layer.window)
        mask = mask.repeat(heads // k.shape[0], 1)  # (H/K * T, S)
        attended = F.scaled_dot_product_attention(mine[None], k[None], v[None], attn_mask=mask)[0]
        # (K, H/K * T, D) -> (T, H, D)
        out[first:last] = attended.reshape(heads, new, -1).transpose(0, 1)
    projected: Tensor = layer.o(out.flatten(1))[None]
    return projected
