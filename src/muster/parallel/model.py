"""A transformer on a layout, as one rank sees it: the parameters it holds, its part of a step, its part of a score.

Training (`train/`) knows only this; how the axes work together is decided here and in `apply.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.parallel import data
from muster.parallel.apply import Value, apply
from muster.parallel.inputs import Inputs
from muster.parallel.mesh import Mesh


class ParallelModel:
    def __init__(self, spec: TransformerSpec, mesh: Mesh, *, compute: torch.dtype, value: Value) -> None:
        """Build this rank's part in place, its parameters filled from `value`; matrices compute in `compute`."""
        self.mesh = mesh
        with torch.device("meta"):
            self._model = Transformer(spec)
        apply(self._model, mesh, compute=compute, value=value)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What this rank holds, each parameter once, by the undivided model's names."""
        return list(self._model.named_parameters())

    def train(self, microbatches: Sequence[Inputs], scale: float) -> Tensor:
        """Forward and backward passes; gradients become those of the global loss sum times `scale`.

        Returns this rank's share of the summed loss: the shares of all ranks sum to it.
        """
        layout = self.mesh.layout
        total = torch.zeros((), device=self.mesh.device)
        for index, inputs in enumerate(microbatches):
            data.begin_microbatch(self._model, layout, is_last=index == len(microbatches) - 1)
            loss = self._loss(inputs)
            data.sum_over_ranks(loss * scale, layout).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total * self.mesh.counts_loss

    @torch.no_grad()
    def score(self, microbatches: Sequence[Inputs]) -> Tensor:
        """This rank's share of the summed loss, without gradients."""
        total = torch.zeros((), device=self.mesh.device)
        for inputs in microbatches:
            total += self._loss(inputs)
        return total * self.mesh.counts_loss

    def rest(self) -> None:
        """Drop gathered parameters after scoring, so that the shards are in place."""
        data.free_gathered(self._model)

    def _loss(self, inputs: Inputs) -> Tensor:
        loss: Tensor = self._model(
            inputs.tokens, inputs.targets, documents=inputs.documents, positions=inputs.positions
        )
        return loss
