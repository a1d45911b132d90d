"""Offload to the host (ZeRO-Offload, Ren et al. 2021): where FSDP2 keeps parameters, gradients and optimizer state.

`disk` differs from `cpu` only in where the optimizer keeps its moments, which the optimizer sees to.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

Offload = Literal["none", "cpu", "disk"]


def policy(offload: Offload) -> OffloadPolicy:
    """What `fully_shard` needs to know."""
    if offload == "none":
        return OffloadPolicy()
    # Pinned memory makes copies to an accelerator asynchronous; without one it cannot be had.
    return CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())


def home(offload: Offload, compute: str) -> str:
    """Device type of the master parameters, for ranks that compute on the device type `compute`."""
    return compute if offload == "none" else "cpu"
