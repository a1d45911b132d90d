"""Memory by torch's own accounting, on any device: what autograd keeps of a forward pass, and what tensors there are.

Knows tensors and their storages, and neither models nor ranks. What allocators round up and cache is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class KeptActivations:
    """Counts, within its context, the storages that autograd saves for the backward pass, each once while it lives.

    `parameters` gives the tensors that are not counted, because they are held anyhow; it is asked at every saved
    tensor, since gathered parameters come and go. What recomputation makes in the backward pass is not seen.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self.now_bytes = 0
        self.peak_bytes = 0
        self._parameters = parameters
        self._seen = weakref.WeakSet[torch.UntypedStorage]()
        # Without the detaching, an operation that saves its own output would keep itself alive.
        self._hooks = saved_tensors_hooks(self._count, lambda kept: kept)

    def __enter__(self) -> KeptActivations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.__exit__()

    def _count(self, saved: Tensor) -> Tensor:
        kept = saved.detach()
        storage = storage_of(kept)
        held = (storage_of(parameter).data_ptr() for parameter in self._parameters())
        if storage not in self._seen and storage.data_ptr() not in held:
            self._seen.add(storage)
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())
        return kept

    def _add(self, count: int) -> None:
        self.now_bytes += count
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within its context, the most bytes that tensors made in it took, looked at whenever new ones are made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._storages = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        found = {
            storage_of(x) for x in tree_leaves(made) if isinstance(x, Tensor) and x.device.type != "meta"
        }
        if any(storage not in self._storages for storage in found):
            self._storages.update(found)
            # Summed anew, because storages also shrink and grow in place: FSDP's do.
            now_bytes = sum(storage.nbytes() for storage in self._storages)
            self.peak_bytes = max(self.peak_bytes, now_bytes)
        return made


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Where this rank's part of a tensor is."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors' storages on this rank, each counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(storage_of, tensors)}
    return sum(storages.values())
