"""A transformer on a layout, as one rank sees it: the parameters it holds, its part of a step, its part of a score.

Training (`train/`) knows only this; how the axes work together is decided here and in `apply.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from muster.comm.compress import compress
from muster.model.balance import update_bias
from muster.model.moe import MoE
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.parallel import data, stages
from muster.parallel.apply import Value, apply
from muster.parallel.inputs import Inputs
from muster.parallel.layout import Layout
from muster.parallel.mesh import Mesh, Place
from muster.parallel.pipeline import Activations, Pipeline
from muster.parallel.schedules import stages_of_rank

Named = list[tuple[str, nn.Parameter]]
_TIED = "embed.weight"


class ParallelModel:
    def __init__(
        self, spec: TransformerSpec, mesh: Mesh, *, sequence: int, compute: torch.dtype, value: Value
    ) -> None:
        """Build this rank's part in place, its parameters filled from `value`; matrices compute in `compute`.

        `sequence` is the tokens of one row of the batch.
        """
        self.mesh, self._spec = mesh, spec
        self._parts: dict[int, Transformer] = {}
        for index, layers in layers_of_rank(spec, mesh.layout, mesh.place, sequence).items():
            with torch.device("meta"):
                self._parts[index] = Transformer(spec, layers)
            apply(self._parts[index], mesh, compute=compute, value=value)
        groups = mesh.groups if mesh.layout.sync is None else {}  # else nothing is reduced over copies here
        self._compression = [compress(part, mesh.layout.compress, groups) for part in self._parts.values()]
        self._pipeline = _pipeline(self._parts, spec, mesh, sequence, compute)

    def named_parameters(self) -> Named:
        """What this rank holds, each parameter once over all ranks of the pipeline, by the undivided model's names."""
        copies = {id(parameter) for _, parameter in self.copies()}
        return [
            (name, parameter)
            for part in self._parts.values()
            for name, parameter in part.named_parameters()
            if id(parameter) not in copies
        ]

    def copies(self) -> Named:
        """Second copies of parameters, kept equal: a tied embedding is on the first and on the last stage."""
        return [
            (_TIED, part.embed.get_parameter("weight"))
            for part in self._parts.values()
            if part.embed is not None and not part.is_first
        ]

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        """What this rank holds that is kept but not trained by gradients; whole on every rank of a stage."""
        return [named for part in self._parts.values() for named in part.named_buffers()]

    def train(self, microbatches: Sequence[Inputs], scale: float, balance: float = 0.0) -> Tensor:
        """Forward and backward passes; gradients become those of the global loss sum times `scale`.

        `balance` is the coefficient of the experts' balance loss. Returns this rank's share of the summed loss
        (without that): the shares of all ranks sum to it.
        """
        layout = self.mesh.layout
        # FSDP2 averages gradients over the ranks that hold the same parameters; so they are summed. (Asking it for a
        # divide factor of 1 costs two more passes over the gradients where a rank is alone on its shard axis,
        # and an operation that gloo lacks elsewhere.)
        scale *= layout.averaged
        microbatches = [self._own_tokens(inputs) for inputs in microbatches]
        for moe in self._sparse_layers().values():
            # Every tensor rank routes the same tokens, and the gradients of routers are summed over them.
            moe.aux_scale = balance * scale / layout.tensor
        if self._pipeline is not None:
            total = self._pipeline.step(Inputs.join(microbatches), loss_scale=scale)
            self._sum_tied(self._pipeline)
            return total * self.mesh.counts_loss
        (model,) = self._parts.values()
        total = torch.zeros((), device=self.mesh.device)
        for index, inputs in enumerate(microbatches):
            data.begin_microbatch(model, layout, is_last=index == len(microbatches) - 1)
            loss = model(inputs.tokens, **inputs.named())
            (loss * scale).backward()
            total += loss.detach()
        return total * self.mesh.counts_loss

    def take_load(self) -> Tensor | None:
        """Tokens sent to each expert of each layer since the last call by the ranks that take a step together, (L, X);
        None without experts."""
        if not self._spec.experts:
            return None
        load = torch.zeros(self._spec.layers, self._spec.experts, dtype=torch.int64, device=self.mesh.device)
        for layer, moe in self._sparse_layers().items():
            load[layer] = moe.load * self.mesh.counts_loss
            moe.reset_load()
        if self.mesh.together.size > 1:
            dist.all_reduce(load, group=self.mesh.together.group)
        return load

    def balance_by_bias(self, load: Tensor, rate: float) -> None:
        """Move the routers' biases after a step with that load (L, X) by `rate` (Wang et al. 2024)."""
        for layer, moe in self._sparse_layers().items():
            assert moe.router.bias is not None
            update_bias(moe.router.bias, load[layer], rate)

    @torch.no_grad()
    def score(self, microbatches: Sequence[Inputs]) -> Tensor:
        """This rank's share of the summed loss, without gradients."""
        microbatches = [self._own_tokens(inputs) for inputs in microbatches]
        if self._pipeline is not None:
            return self._pipeline.evaluate(Inputs.join(microbatches)) * self.mesh.counts_loss
        (model,) = self._parts.values()
        total = torch.zeros((), device=self.mesh.device)
        for inputs in microbatches:
            total += model(inputs.tokens, **inputs.named())
        return total * self.mesh.counts_loss

    def rest(self) -> None:
        """Drop gathered parameters after scoring, so that the shards are in place."""
        for part in self._parts.values():
            data.free_gathered(part)

    def forget_residuals(self) -> None:
        """Drop what compressed gradients lost so far, which no checkpoint holds: a run that goes on stays equal to
        one that resumes."""
        for compression in self._compression:
            compression.forget()

    def _sparse_layers(self) -> dict[int, MoE]:
        """The layers with experts on this rank, by their number in the model."""
        return {
            block.attention.layer: block.mlp
            for part in self._parts.values()
            for block in part.blocks
            if isinstance(block.mlp, MoE)
        }

    def _own_tokens(self, inputs: Inputs) -> Inputs:
        layout = self.mesh.layout
        if layout.context == 1:
            return inputs
        return inputs.own_tokens(rank=self.mesh.place.context, ranks=layout.context, kind=layout.context_kind)

    def _sum_tied(self, pipeline: Pipeline) -> None:
        if self._spec.tied:
            embeddings = [part.embed.get_parameter("weight") for part in self._parts.values() if part.embed]
            gradients = [embedding.grad for embedding in embeddings if embedding.grad is not None]
            pipeline.sum_tied([g.to_local() if isinstance(g, DTensor) else g for g in gradients])


def layers_of_rank(spec: TransformerSpec, layout: Layout, place: Place, sequence: int) -> dict[int, range]:
    """The layers of each stage that a rank holds, by the stage's index."""
    if layout.split is None:
        ranges = stages.split(stages.costs(spec, sequence), layout.pipeline * layout.virtual)
    else:
        ranges = stages.explicit(layout.split)
    own = stages_of_rank(layout.schedule, place.pipeline, layout.pipeline, layout.virtual)
    return {index: ranges[index] for index in own}


def _pipeline(
    parts: dict[int, Transformer], spec: TransformerSpec, mesh: Mesh, sequence: int, compute: torch.dtype
) -> Pipeline | None:
    layout = mesh.layout
    if layout.pipeline == 1:
        return None
    return Pipeline(
        parts,
        schedule=layout.schedule,
        microbatches=layout.accumulate,
        rows=layout.microbatch,
        tokens=sequence // layout.context,
        activations=Activations(
            width=spec.width,
            dtype=compute,
            device=mesh.device,
            divided=layout.tensor if layout.sequence_parallel else 1,
        ),
        group=mesh.groups["pipeline"],
    )
