"""A model's weights as the engine multiplies with them: q, k, v and gate, up in one matrix each, in a serving format.

Made from a `Transformer`'s own parameters. Names are those of the model, with `qkv` and `gate_up` for what was fused.
The embedding, norms, learned positions and experts stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muster.model.mlp import MLP
from muster.model.moe import MoE
from muster.model.spec import TransformerSpec
from muster.model.transformer import Norm, Transformer, named_tensors
from muster.serve.engine.hugepages import HugePages
from muster.serve.engine.part import Part
from muster.serve.kernels.packing import Format, Weights, pack, quantize

LOW_RANK = ("qkv", "o", "head")
"""Matrices whose R largest directions are not rounded in int8 and int4. On the demo's model two thirds of what int8
costs come from these, at a fifth of a larger model's products; the others would take off a tenth more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedModel:
    """Everything that a network needs."""

    part: Part
    format: Format
    compute: torch.dtype
    """The type of activations, of the embedding, and of the keys and values in the cache."""
    linears: Mapping[str, Weights]
    tensors: Mapping[str, Tensor]
    """The rest: norms in fp32; embedding, positions and experts in `compute` (a router's bias in fp32)."""

    @property
    def spec(self) -> TransformerSpec:
        """Sizes of what is here."""
        return self.part.spec


@torch.no_grad()
def pack_model(
    model: Transformer,
    format: Format,
    *,
    part: Part | None = None,
    head: Format | None = None,
    packed: bool = True,
) -> PackedModel:
    """A whole model, or that `part` of one, in a format. int8 and int4 compute in bf16.

    `head` is the head's format: int8 for int4 models, because rounding the head to 4 bits costs more than all other
    layers (`benchmarks/serve_quality_cpu.py`).
    With `packed` the linear layers are in the kernels' layout.
    """
    part = part or Part.of(model.spec)
    compute = torch.float32 if format == "fp32" else torch.bfloat16
    linears: dict[str, Weights] = {}
    pages = HugePages()
    tensors: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor, bias: Tensor | None, format: Format) -> None:
        plain = quantize(weight, bias, format, low_rank=name.rpartition(".")[2] in LOW_RANK)
        if packed:
            kept = pack(plain)
            plain = kept.map(pages.place)
        linears[name] = plain

    def add(name: str, parts: list[nn.Linear]) -> None:
        weight = torch.cat([part.weight for part in parts])
        put(name, weight, None if parts[0].bias is None else torch.cat([part.bias for part in parts]), format)

    def add_norm(name: str, norm: Norm | None) -> None:
        if norm is not None:
            for part, tensor in named_tensors(norm):
                tensors[f"{name}.{part}"] = tensor.float()

    if model.is_first:
        assert model.embed is not None
        tensors["embed"] = model.embed.weight.to(compute)
    if model.positions is not None:
        tensors["positions"] = model.positions.weight.to(compute)
    for block in model.blocks:
        attention = block.attention
        at = f"layers.{attention.layer}"
        add(f"{at}.qkv", [attention.q, attention.k, attention.v])
        add(f"{at}.o", [attention.o])
        add_norm(f"{at}.attention_norm", block.attention_norm)
        add_norm(f"{at}.mlp_norm", block.mlp_norm)
        add_norm(f"{at}.q_norm", attention.q_norm)
        add_norm(f"{at}.k_norm", attention.k_norm)
        if isinstance(block.mlp, MoE):
            trained = {name for name, _ in block.mlp.named_parameters()}
            for name, tensor in named_tensors(block.mlp):
                tensors[f"{at}.moe.{name}"] = tensor.to(compute) if name in trained else tensor
        else:
            assert isinstance(block.mlp, MLP)
            gate = [] if block.mlp.gate is None else [block.mlp.gate]
            add(f"{at}.gate_up", [*gate, block.mlp.up])
            add(f"{at}.down", [block.mlp.down])
    add_norm("norm", model.norm)
    if model.is_last:
        table = model.embed if model.head is None else model.head
        assert table is not None
        put("head", table.weight, None, head or ("int8" if format == "int4" else format))
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return PackedModel(part=part, format=format, compute=compute, linears=linears, tensors=contiguous)
