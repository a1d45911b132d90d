"""Keys and values of tokens already seen, in fixed slots: one sequence a slot, each with its own length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muster.model.spec import TransformerSpec


class KVCache:
    """Room for `slots` sequences of `capacity` tokens: keys and values (layers, slots, K, capacity, D)."""

    def __init__(
        self,
        spec: TransformerSpec,
        slots: int,
        *,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (spec.layers, slots, spec.kv_heads, capacity, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * slots

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def select(self, slots: Sequence[int]) -> CacheRows:
        """The slots that the rows of the next forward pass append to, in row order."""
        return CacheRows(self, slots)

    def free(self, slot: int) -> None:
        """Forget a sequence; its slot can be used for another one."""
        self.lengths[slot] = 0


class CacheRows:
    """Some slots of a cache as the batch rows of one forward pass over (B, T) new tokens."""

    def __init__(self, cache: KVCache, slots: Sequence[int]) -> None:
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} repeat: a forward pass appends to a slot once")
        self._cache, self._slots = cache, list(slots)
        self._index = torch.tensor(self._slots, device=cache.keys.device)  # (B,)

    @property
    def starts(self) -> Tensor:
        """Position of each row's first new token, (B,)."""
        lengths = [self._cache.lengths[slot] for slot in self._slots]
        return torch.tensor(lengths, device=self._index.device)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, K, T, D) of a layer; returns all of the rows' (B, K, longest, D)."""
        starts, new = self.starts, keys.shape[2]
        # From the host's own list: asking the tensor would wait for the device in every layer.
        longest = max(self._cache.lengths[slot] for slot in self._slots) + new
        if longest > self._cache.capacity:
            raise ValueError(f"a sequence of {longest} tokens does not fit a cache of {self._cache.capacity}")
        positions = starts[:, None] + torch.arange(new, device=starts.device)  # (B, T)
        rows = self._index[:, None].expand_as(positions)
        # Indexing slots and positions around K gives (B, T, K, D).
        self._cache.keys[layer][rows, :, positions] = keys.transpose(1, 2)
        self._cache.values[layer][rows, :, positions] = values.transpose(1, 2)
        seen = slice(longest)
        return self._cache.keys[layer][self._index, :, seen], self._cache.values[layer][self._index, :, seen]

    def advance(self, tokens: int) -> None:
        """Count the tokens of a finished forward pass."""
        for slot in self._slots:
            self._cache.lengths[slot] += tokens
