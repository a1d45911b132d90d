"""One forward pass over a batch of packed documents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from muster.data.packing import Batch


def summed_loss(model: nn.Module, batch: Batch, device: torch.device, *, mask_documents: bool) -> Tensor:
    """Summed cross entropy of a batch in nats, fp32 scalar."""
    tokens = torch.from_numpy(batch.tokens).to(device)  # (B, T)
    targets = torch.from_numpy(batch.targets).to(device)  # (B, T)
    documents = None
    # Where no row holds a border, plain causal attention is the same, and faster.
    if mask_documents and bool((batch.documents[:, :1] != batch.documents[:, -1:]).any()):
        documents = torch.from_numpy(batch.documents).to(device)
    loss: Tensor = model(tokens, targets, documents=documents)
    return loss
