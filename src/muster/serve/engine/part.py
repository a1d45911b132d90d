"""The part of a model that one rank serves: a stretch of its layers, and its share of their matrices.

What is divided along which dim is training's own table (`parallel/tensor_plan.py`). A rank's part is a `Transformer` of
fewer heads, a narrower feed-forward block and a piece of the vocabulary, so that what packs and computes a whole model
packs and computes a part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, Value
from muster.parallel import stages, vocabulary
from muster.parallel.tensor_plan import divided_dim, plan_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which part of the model `whole` it is."""

    whole: TransformerSpec
    layers: range
    ranks: int = 1
    """Tensor ranks that these layers are divided over,"""
    index: int = 0
    """and which of them this is."""

    @classmethod
    def of(cls, whole: TransformerSpec, rank: int = 0, *, tensor: int = 1, pipeline: int = 1) -> Part:
        """The part of a rank; ranks are numbered as in training, the tensor axis innermost."""
        stage, index = divmod(rank, tensor)
        layers = stages.split(stages.costs(whole, whole.context), pipeline)[stage]
        return cls(whole=whole, layers=layers, ranks=tensor, index=index)

    @property
    def spec(self) -> TransformerSpec:
        """The whole model's, with the sizes that this rank's share of a layer has."""
        whole, ranks = self.whole, self.ranks
        return replace(
            whole,
            heads=whole.heads // ranks,
            kv_heads=max(whole.kv_heads // ranks, 1),
            ffn=whole.ffn // ranks,
            expert_ffn=whole.expert_ffn // ranks,
            shared_ffn=whole.shared_ffn // ranks,
            vocab=len(self.tokens),
        )

    @property
    def tokens(self) -> range:
        """The tokens whose embeddings and logits are here."""
        return vocabulary.parts(self.whole.vocab, self.ranks)[self.index]

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's share of a parameter of one of its layers."""
        kv_heads, head_dim = self.whole.kv_heads, self.whole.head_dim
        dim = divided_dim(name, kv_heads=kv_heads, ranks=self.ranks)
        if dim is not None:
            piece = vocabulary.parts(tensor.shape[dim], self.ranks)[self.index]
            return tensor.narrow(dim, piece.start, len(piece))
        kind = plan_of(name)
        if kind == "heads":
            return tensor.narrow(0, self.index * kv_heads // self.ranks * head_dim, head_dim)
        return torch.zeros_like(tensor) if kind == "once" and self.index else tensor


@torch.no_grad()
def load_part(part: Part, value: Value, *, dtype: torch.dtype) -> Transformer:
    """A part with values that are asked for one at a time, so that memory holds it once."""
    with torch.device("meta"):
        whole, own = Transformer(part.whole, part.layers), Transformer(part.spec, part.layers)
    for parameter in own.parameters():
        parameter.data = parameter.data.to(dtype)  # and not the buffers, which are fp32 for a reason
    own = own.to_empty(device="cpu").eval()
    for name, parameter in own.named_parameters():
        parameter.copy_(part.own(name, value(name, whole.get_parameter(name).shape)))
    for name, buffer in own.named_buffers():
        buffer.copy_(value(name, buffer.shape))
    return own
