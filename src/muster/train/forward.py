"""From a batch of packed documents to the tensors of a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from muster.data.packing import Batch
from muster.parallel.inputs import Inputs


def to_inputs(batch: Batch, device: torch.device, *, mask_documents: bool) -> Inputs:
    """The batch on a device; with `mask_documents`, its documents where any row holds a border between two."""
    documents = None
    # Where no row holds a border, plain causal attention is the same, and faster.
    if mask_documents and bool((batch.documents[:, :1] != batch.documents[:, -1:]).any()):
        documents = torch.from_numpy(batch.documents).to(device)
    return Inputs(
        tokens=torch.from_numpy(batch.tokens).to(device),
        targets=torch.from_numpy(batch.targets).to(device),
        documents=documents,
    )


def summed_loss(model: nn.Module, batch: Batch, device: torch.device, *, mask_documents: bool) -> Tensor:
    """Summed cross entropy of a batch in nats, fp32 scalar, by a model in one process."""
    inputs = to_inputs(batch, device, mask_documents=mask_documents)
    loss: Tensor = model(inputs.tokens, inputs.targets, documents=inputs.documents)
    return loss
