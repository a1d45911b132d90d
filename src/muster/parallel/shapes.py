"""The parameters that a rank holds, as names and shapes: what memory is made of before there is a model.

Pure; knows no torch. Names are those of the undivided model. The units are FSDP2's (`data.py`): each block, experts
that are divided, the embedding where the head is another matrix of the same stage, and the rest of a stage together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from muster.model.spec import TransformerSpec
from muster.parallel.layout import Layout
from muster.parallel.tensor_plan import plan_of

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Parameters that are gathered and reduced together."""

    shapes: dict[str, Shape]
    """Of one tensor and expert rank, whole along the shard axis."""
    shard: int
    """Ranks that share each of them under ZeRO."""
    layer: int | None
    """The block that it is part of; None around the blocks."""

    @property
    def elements(self) -> int:
        """All of the unit, as it is gathered: rows that do not divide are padded."""
        return self.shard * self.shard_elements

    @property
    def shard_elements(self) -> int:
        """One rank's part, padding included."""
        return sum(self.shard_of(shape) for shape in self.shapes.values())

    def shard_of(self, shape: Shape) -> int:
        """Elements of one rank's part of a parameter, padding included."""
        return -(-shape[0] // self.shard) * prod(shape[1:])


def units(spec: TransformerSpec, layout: Layout, layers: range) -> Iterator[Unit]:
    """The units of a stage with these layers, outermost last."""
    dense, sparse = shard_ranks(layout)
    for layer in layers:
        prefix = f"layers.{layer}."
        named = _divided(_block(spec), prefix, spec, layout)
        experts = {name: shape for name, shape in named.items() if ".experts." in name}
        if layout.expert > 1 and experts:
            yield Unit(shapes=experts, shard=sparse, layer=layer)
            named = {name: shape for name, shape in named.items() if name not in experts}
        yield Unit(shapes=named, shard=dense, layer=layer)
    around = _divided(_around(spec, layers), "", spec, layout)
    if "head.weight" in around and "embed.weight" in around:
        yield Unit(shapes={"embed.weight": around.pop("embed.weight")}, shard=dense, layer=None)
    yield Unit(shapes=around, shard=dense, layer=None)


def shard_ranks(layout: Layout) -> tuple[int, int]:
    """Over how many ranks ordinary parameters are sharded, and over how many those of experts."""
    if layout.zero == 0:
        return 1, 1
    return layout.shard * layout.context, layout.shard * layout.context // layout.expert


def _around(spec: TransformerSpec, layers: range) -> dict[str, Shape]:
    is_first, is_last = layers.start == 0, layers.stop == spec.layers
    table = (spec.vocab, spec.width)
    found: dict[str, Shape] = {}
    if is_first or (is_last and spec.tied):
        found["embed.weight"] = table
    if is_first and spec.positions == "learned":
        found["positions.weight"] = (spec.context, spec.width)
    if is_last:
        found |= _norm("norm", spec, spec.width)
        found |= {} if spec.tied else {"head.weight": table}
    return found


def _block(spec: TransformerSpec) -> dict[str, Shape]:
    E, q, kv = spec.width, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    found = _norm("attention_norm", spec, E) | _norm("mlp_norm", spec, E)
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        found |= _linear(f"attention.{name}", rows, E, bias=spec.qkv_bias)
    found |= _linear("attention.o", E, q, bias=spec.out_bias)
    if spec.qk_norm:
        found |= _norm("attention.q_norm", spec, spec.head_dim) | _norm(
            "attention.k_norm", spec, spec.head_dim
        )
    if not spec.experts:
        return found | _mlp("mlp", spec, spec.ffn)
    X, F = spec.experts, spec.expert_ffn
    found["mlp.router.weight"] = (X, E)
    found |= {"mlp.experts.gate": (X, F, E), "mlp.experts.up": (X, F, E), "mlp.experts.down": (X, E, F)}
    return found | (_mlp("mlp.shared", spec, spec.shared_ffn) if spec.shared_ffn else {})


def _mlp(name: str, spec: TransformerSpec, ffn: int) -> dict[str, Shape]:
    found = _linear(f"{name}.up", ffn, spec.width, bias=spec.mlp_bias)
    found |= _linear(f"{name}.down", spec.width, ffn, bias=spec.mlp_bias)
    if spec.mlp == "swiglu":
        found |= _linear(f"{name}.gate", ffn, spec.width, bias=spec.mlp_bias)
    return found


def _norm(name: str, spec: TransformerSpec, size: int) -> dict[str, Shape]:
    leaves = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    return {f"{name}.{leaf}": (size,) for leaf in leaves}


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _divided(
    shapes: dict[str, Shape], prefix: str, spec: TransformerSpec, layout: Layout
) -> dict[str, Shape]:
    """One rank's part of parameters on the expert and the tensor axis, the largest of any rank."""
    return {prefix + name: _part(prefix + name, shape, spec, layout) for name, shape in shapes.items()}


def _part(name: str, shape: Shape, spec: TransformerSpec, layout: Layout) -> Shape:
    sizes = list(shape)
    if ".experts." in name:
        sizes[0] //= layout.expert
    kind = plan_of(name)
    if kind == "heads" and spec.kv_heads % layout.tensor == 0:
        kind = 0
    if isinstance(kind, int):
        sizes[kind] = -(-sizes[kind] // layout.tensor)
    return tuple(sizes)
