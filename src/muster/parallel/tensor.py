"""Tensor parallelism (Shoeybi et al. 2019) and sequence parallelism (Korthikanti et al. 2022).

A table (`tensor_plan.py`) says along which dim each parameter is divided; it becomes a DTensor on the tensor axis
under its own name.
Inside the model's modules `self.weight` is then this rank's part, a plain tensor, so their code runs unchanged. What
is left are the borders of a region (attention, feed-forward, loss), where ranks exchange activations:

                     into a region                          out of it
    sequence         all-gather of the tokens               reduce-scatter over the tokens
    not sequence     nothing (backward: all-reduce)         all-reduce

Between regions each rank holds T / tensor of the tokens under sequence parallelism, else all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from muster.model.transformer import Transformer
from muster.parallel import vocabulary
from muster.parallel.exchange import Exchange
from muster.parallel.tensor_plan import divided_dim, is_summed, plan_of


def divide(model: Transformer, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Divide a model on the meta device over the tensor axis, in place."""
    exchange = Exchange(mesh.get_group(), sequence=sequence)
    for name, module in list(model.named_modules()):
        views = {}
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue  # experts, which the expert axis has divided on both
            full = f"{name}.{leaf}" if name else leaf
            placement, views[leaf] = _treatment(full, model, mesh, sequence=sequence)
            divided = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
            module.register_parameter(leaf, nn.Parameter(divided))
        if views:
            _localize(module, mesh, views)
    for region in _regions(model):
        region.register_forward_pre_hook(lambda _, args: (exchange.enter(args[0]), *args[1:]))
        region.register_forward_hook(lambda _, args, out: exchange.leave(out))
    if model.embed is not None:
        _look_up_by_vocabulary(model.embed, model.spec.vocab, exchange)
    if model.positions is not None:
        model.positions.register_forward_pre_hook(lambda _, args: (exchange.own_tokens(args[0]),))
    if model.norm is not None:
        # The head and the loss see all tokens and this rank's part of the vocabulary.
        model.norm.register_forward_hook(lambda _, args, out: exchange.enter(out))
        model.cross_entropy = vocabulary.ParallelCrossEntropy(model.spec.vocab, exchange.group)
        model.register_forward_hook(_whole_logits(model.spec.vocab, exchange), with_kwargs=True)


View = Callable[[DTensor], Tensor]


def _treatment(name: str, model: Transformer, mesh: DeviceMesh, *, sequence: bool) -> tuple[Placement, View]:
    """How a parameter is stored on the tensor axis, and what a module sees of it there."""
    kv_heads, ranks, rank = model.spec.kv_heads, mesh.size(), mesh.get_local_rank()
    dim = divided_dim(name, kv_heads=kv_heads, ranks=ranks)
    if dim is not None:
        return Shard(dim), DTensor.to_local
    if not is_summed(name, kv_heads=kv_heads, ranks=ranks, sequence=sequence):
        return Replicate(), DTensor.to_local
    if plan_of(name) == "heads":
        first = rank * kv_heads // ranks * model.spec.head_dim
        own = slice(first, first + model.spec.head_dim)
        return Replicate(), lambda parameter: _part_of_whole(parameter)[own]
    if plan_of(name) == "once":
        return Replicate(), lambda parameter: _part_of_whole(parameter) * float(rank == 0)
    return Replicate(), _part_of_whole


def _part_of_whole(parameter: DTensor) -> Tensor:
    """A parameter that every rank holds whole, but whose gradient is a sum over what the ranks do with it."""
    return parameter.to_local(grad_placements=[Partial()])


def _localize(module: nn.Module, mesh: DeviceMesh, views: dict[str, View]) -> None:
    """Let a module's own code see plain tensors where its parameters are DTensors on the tensor axis.

    Its class gets properties in the way; `named_parameters` and checkpoints look past them. While FSDP2 has a
    parameter sharded, which it is on a mesh of more axes, its own code asks for the parameter and gets it.
    """

    def seen(name: str) -> property:
        def get(self: nn.Module) -> Tensor:
            parameter = cast(DTensor, self._parameters[name])
            return views[name](parameter) if parameter.device_mesh == mesh else parameter

        return property(get)

    kind = type(module)
    module.__class__ = type(f"Local{kind.__name__}", (kind,), {name: seen(name) for name in views})


def _regions(model: Transformer) -> Iterator[nn.Module]:
    for block in model.blocks:
        yield block.attention
        yield block.mlp


def _look_up_by_vocabulary(embed: nn.Embedding, vocab: int, exchange: Exchange) -> None:
    """Each rank looks up the tokens of its part of the vocabulary; the others' rows are zero, and the sum has all."""
    first = vocabulary.parts(vocab, exchange.group.size())[exchange.group.rank()].start

    def forward(tokens: Tensor) -> Tensor:
        weight = embed.weight  # (V / ranks, E)
        index = tokens - first
        foreign = (index < 0) | (index >= weight.shape[0])
        rows = F.embedding(index.masked_fill(foreign, 0), weight)  # (B, T, E)
        return exchange.leave(rows.masked_fill(foreign[..., None], 0))

    embed.forward = forward  # type: ignore[method-assign, assignment]


def _whole_logits(vocab: int, exchange: Exchange) -> Callable[..., Any]:
    def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Tensor | None:
        scored = len(args) > 1 or kwargs.get("targets") is not None
        return None if scored else vocabulary.gather_logits(out, vocab, exchange.group)

    return gather
