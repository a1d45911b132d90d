"""The operations that a network is served with, and which implementation of them runs.

N new tokens, H heads, K kv heads, D head dim, E width, F ffn. `reference.py` is their definition.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from muster.serve.engine.batch import Batch, PagedCache
from muster.serve.kernels.build import Unavailable, load_library
from muster.serve.kernels.native import Native
from muster.serve.kernels.packing import Weights
from muster.serve.kernels.reference import Reference
from muster.serve.kernels.shape import Heads, QKNorm, Rotation, Trunk


class Stack(Protocol):
    """A trunk in one call, and the same bits as from one operation after the other. Batches have been checked."""

    whole: bool
    """Whether it is all there, so that there are logits."""

    def through(self, batch: Batch, cache: PagedCache, x: Tensor) -> Tensor:
        """x (N, E) through the layers, in place; returns what is still to be added to it."""
        ...

    def logits(self, batch: Batch, cache: PagedCache) -> Tensor:
        """fp32 (W, V) of the wanted rows."""
        ...


class Kernels(Protocol):
    """What `Reference` and `Native` both are; activations and pages are of the type `compute`, fp32 or bf16."""

    compute: torch.dtype
    device: torch.device

    def linear(self, weights: Weights, out: torch.dtype) -> Callable[[Tensor], Tensor]: ...

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor: ...

    def swiglu(self, gate_up: Tensor) -> Tensor: ...

    def rotate_store(
        self, qkv: Tensor, heads: Heads, rotation: Rotation | None, norm: QKNorm | None, slots: Tensor,
        keys: Tensor, values: Tensor,
    ) -> None: ...  # fmt: skip

    def attend(self, qkv: Tensor, heads: Heads, batch: Batch, keys: Tensor, values: Tensor) -> Tensor: ...

    def stack(self, trunk: Trunk) -> Stack | None: ...

    def check(self, batch: Batch, cache: PagedCache, vocabulary: int) -> None: ...


def choose_kernels(compute: torch.dtype, device: torch.device | str = "cpu") -> tuple[Kernels, str]:
    """(the fastest operations that this machine has for a device and type, why). May compile for some seconds."""
    device = torch.device(device)
    if device.type == "cuda" and find_spec("triton") is not None:
        from muster.serve.kernels.triton_ops import Triton  # a second of imports, for GPUs alone

        return Triton(compute, device), f"Triton kernels on {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        missing = (
            "Triton is not installed"
            if device.type == "cuda"
            else f"the C++ kernels are for CPUs, not for {device.type}"
        )
        return Reference(compute, device), f"torch operations: {missing}"
    try:
        library, origin = load_library()
    except Unavailable as reason:
        return Reference(compute, device), f"torch operations, several times slower: {reason}"
    return Native(library, compute), f"C++ kernels with {origin}"
