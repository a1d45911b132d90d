"""What Megatron-LM calls a transformer's tensors, and how its tensor-parallel ranks divide them.

It has three sets of names: those of its first models ("legacy"), of Megatron-Core, and of Megatron-Core with
Transformer Engine, whose norms are part of the linear layer behind them. All become Megatron-Core's here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from muster.convert.torchfile import StoredTensor
from muster.model.spec import TransformerSpec

_RENAMED = (
    (r"^language_model\.embedding\.", "embedding."),
    (r"^language_model\.(encoder|transformer)\.", "decoder."),
    (r"^language_model\.output_layer\.", "output_layer."),
    (r"^word_embeddings_for_head\.", "output_layer."),
    (r"\.attention\.", ".self_attention."),
    (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.(post_attention_layernorm|post_attention_norm)\.", ".pre_mlp_layernorm."),
    (r"\.final_norm\.", ".final_layernorm."),
    (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1"),
    (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1"),
)
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def stored_tensors(model: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of one rank's part of a model, in its order; layers are numbered from 0 in each part."""
    return {_renamed(name): tensor for name, tensor in _flattened(model, "")}


def layers_of(names: Mapping[str, Any]) -> int:
    """How many layers a part has."""
    return len({match[1] for name in names if (match := _LAYER.match(name))})


def shifted(name: str, offset: int) -> str:
    """A part's name as it is in the whole model, where `offset` layers come before the part's first."""
    return _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + offset}.", name)


def _renamed(name: str) -> str:
    for pattern, to in _RENAMED:
        name = re.sub(pattern, to, name)
    return name


def _flattened(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    for key, value in table.items():
        if isinstance(value, StoredTensor) and not key.endswith("_extra_state"):  # that is of fp8
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")


Join = Callable[[list[Tensor]], Tensor]
"""A whole tensor of ours from the parts of the tensor-parallel ranks."""


@dataclass(frozen=True, slots=True)
class Theirs:
    """Where one of our tensors is."""

    name: str
    join: Join


def theirs(spec: TransformerSpec) -> dict[str, Theirs]:
    """Where each tensor of a model is, by our names."""
    vocabulary: Join = lambda parts: torch.cat(parts)[: spec.vocab]  # the rest is padding
    found = {
        "embed.weight": Theirs("embedding.word_embeddings.weight", vocabulary),
        "norm.weight": Theirs("decoder.final_layernorm.weight", _same),
    }
    if spec.positions == "learned":
        found["positions.weight"] = Theirs("embedding.position_embeddings.weight", _same)
    if not spec.tied:
        found["head.weight"] = Theirs("output_layer.weight", vocabulary)
    if spec.norm == "layer":
        found["norm.bias"] = Theirs("decoder.final_layernorm.bias", _same)
    for layer in range(spec.layers):
        for ours, place in _layer(spec).items():
            found[f"layers.{layer}.{ours}"] = Theirs(f"decoder.layers.{layer}.{place.name}", place.join)
    return found


def _layer(spec: TransformerSpec) -> dict[str, Theirs]:
    found: dict[str, Theirs] = {}
    for kind in ("weight", "bias") if spec.norm == "layer" else ("weight",):
        found[f"attention_norm.{kind}"] = Theirs(f"input_layernorm.{kind}", _same)
        found[f"mlp_norm.{kind}"] = Theirs(f"pre_mlp_layernorm.{kind}", _same)
    for kind, said in (("weight", True), ("bias", spec.qkv_bias)):
        for which in "qkv" if said else ():
            found[f"attention.{which}.{kind}"] = Theirs(
                f"self_attention.linear_qkv.{kind}", _of_qkv(spec, which)
            )
    found["attention.o.weight"] = Theirs("self_attention.linear_proj.weight", _columns)
    if spec.out_bias:
        found["attention.o.bias"] = Theirs("self_attention.linear_proj.bias", _same)
    for which in "qk" if spec.qk_norm else "":
        found[f"attention.{which}_norm.weight"] = Theirs(f"self_attention.{which}_layernorm.weight", _same)
    into = ("gate", "up") if spec.mlp == "swiglu" else ("up",)
    for kind, said in (("weight", True), ("bias", spec.mlp_bias)):
        for index, name in enumerate(into if said else ()):
            found[f"mlp.{name}.{kind}"] = Theirs(f"mlp.linear_fc1.{kind}", _of_fused(index, len(into)))
    found["mlp.down.weight"] = Theirs("mlp.linear_fc2.weight", _columns)
    if spec.mlp_bias:
        found["mlp.down.bias"] = Theirs("mlp.linear_fc2.bias", _same)
    return found


def _same(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _columns(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1)


def _of_fused(index: int, count: int) -> Join:
    """Each rank's rows are its part of the first matrix, then its part of the next one."""
    return lambda parts: torch.cat([part.chunk(count)[index] for part in parts])


def _of_qkv(spec: TransformerSpec, which: Literal["q", "k", "v"] | str) -> Join:
    """Rows come by group of query heads: those of its queries, then of the keys and the values that they share."""
    queries = spec.heads // spec.kv_heads
    of = {"q": slice(0, queries), "k": slice(queries, queries + 1), "v": slice(queries + 1, queries + 2)}[
        which
    ]

    def join(parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts)
        grouped = whole.view(
            spec.kv_heads, queries + 2, spec.head_dim, *whole.shape[1:]
        )  # (K, H/K + 2, D, E)
        return grouped[:, of].flatten(0, 2)

    return join
