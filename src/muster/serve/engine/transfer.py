"""Blocks of one engine's prefix cache for another's: a prompt that was computed elsewhere is found as if it had been
computed here (disaggregated prefill: DistServe, Zhong et al. 2024; Splitwise, Patel et al. 2024).

A file in safetensors with a header that is checked: whose weights and kernels, which keys. What does not fit, what is
damaged, or what there is no room for is left alone, as the prompt can always be computed again. Works between steps.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from muster.serve.engine.batch import PagedCache, carry_out
from muster.serve.engine.blocks import Key, chained
from muster.serve.engine.core import Core

_LOG = logging.getLogger(__name__)
_KEY_BYTES = 16


class Porter:
    """Gives and takes blocks of a core's cache. `identity` names all that their content depends on besides tokens."""

    def __init__(self, core: Core, cache: PagedCache, identity: str) -> None:
        self._core, self._cache, self._identity = core, cache, identity

    def give(self, prompt: Sequence[int], path: Path) -> int:
        """Write those blocks of a prompt that are known, from its beginning on, over the file `path`, which is there.
        Returns their number."""
        pool, found, parent = self._core.pool, list[tuple[Key, int]](), self._core.root
        for start in range(0, len(prompt) - pool.block_tokens + 1, pool.block_tokens):
            parent = chained(parent, prompt[start : start + pool.block_tokens])
            block = pool.find(parent)
            if block is None:
                break
            found.append((parent, block))
        chosen = torch.tensor([block for _, block in found], dtype=torch.long)
        tensors = {
            name: layer[chosen.to(layer.device)].cpu() for name, layer in self._layers()
        }  # (n, K, block_tokens, D)
        sums = ",".join(f"{name}={_sum(tensor)}" for name, tensor in tensors.items())
        keys = b"".join(key for key, _ in found).hex()
        content = save(tensors, metadata={"identity": self._identity, "keys": keys, "sums": sums})
        with open(path, "r+b") as file:  # whoever waits for it has made it: nothing is left where nobody does
            file.write(content)
        return len(found)

    def take(self, path: Path) -> int:
        """Take up the blocks of a file; returns how many of them are known now."""
        pool, layers = self._core.pool, list(self._layers())
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                keys = _keys(said["keys"])
                if said["identity"] != self._identity:
                    raise ValueError("they are of another model, or of other kernels")
                sums = dict(one.split("=", 1) for one in said["sums"].split(","))
                tensors = {name: file.get_tensor(name) for name, _ in layers}
        except (KeyError, OSError, SafetensorError) as error:
            raise ValueError(f"they cannot be read ({type(error).__name__})") from None
        for name, layer in layers:
            tensor = tensors[name]
            if tensor.dtype != layer.dtype or tensor.shape != (len(keys), *layer.shape[1:]):
                raise ValueError("they have another shape")
            if _sum(tensor) != sums.get(name):
                raise ValueError("their checksum is wrong")
        known = [pool.find(key) for key in keys]
        new = [place for place, block in enumerate(known) if block is None]
        held = [block for block in known if block is not None]
        for block in held:
            pool.hold(block)  # so that none of them makes room for the others
        if len(new) > pool.free - self._core.streams:  # those that run need theirs
            pool.release(held)
            return len(held)
        taken = [pool.take() for _ in new]
        carry_out(pool.chores(), self._cache)
        for name, layer in layers:
            layer[torch.tensor(taken, dtype=torch.long, device=layer.device)] = tensors[name][new].to(
                layer.device
            )
        for place, block in zip(new, taken, strict=True):
            pool.publish(block, keys[place])
        pool.release(taken)
        pool.release(held)
        return len(keys)

    def move(self, path: Path, prompt: Sequence[int]) -> int:
        """Give a prompt's blocks or, without one, take those of a file; 0 where that fails."""
        try:
            return self.give(prompt, path) if prompt else self.take(path)
        except (OSError, ValueError) as error:
            _LOG.warning("blocks were not moved: %s", error)
            return 0

    def _layers(self) -> list[tuple[str, Tensor]]:
        pairs = zip(self._cache.keys, self._cache.values, strict=True)
        return [
            (f"{kind}.{number}", tensor)
            for number, both in enumerate(pairs)
            for kind, tensor in zip(("keys", "values"), both, strict=True)
        ]


def _keys(said: str) -> list[Key]:
    content = bytes.fromhex(said)
    if len(content) % _KEY_BYTES:
        raise ValueError("their keys are cut")
    return [content[start : start + _KEY_BYTES] for start in range(0, len(content), _KEY_BYTES)]


def _sum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data):08x}"
