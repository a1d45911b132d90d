"""What a step on a layout must send over each axis, before anything runs; the meter has to agree exactly.

Puts the formulas of `comm/` together for a whole layout: which parameters and layers a rank holds is asked of the code
that divides them (on meta), how often and how wide they travel is said here. Not counted are the few bytes that
training adds around a step (losses, norms and expert loads that are summed over the world) and the handshake in a
pipeline's first step. Knows layouts without compression.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from muster.comm import axes
from muster.comm.axes import Heads, Hidden, Routed
from muster.comm.choice import Form
from muster.comm.formulas import Unit, copies_traffic, zero_traffic
from muster.comm.traffic import Traffic
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.parallel import tensor_plan, vocabulary
from muster.parallel.layout import Layout
from muster.parallel.mesh import Place
from muster.parallel.model import layers_of_rank
from muster.parallel.schedules import rank_of_stage

_FP32_BYTES = 4


def expected_traffic(
    spec: TransformerSpec,
    layout: Layout,
    rank: int,
    *,
    sequence: int,
    compute: torch.dtype,
    balance_loss: bool = False,
    routed: Sequence[Routed] | None = None,
) -> Traffic:
    """What `rank` sends in `ParallelModel.train`, by the names of the axes in `Mesh.groups`.

    `sequence`: tokens of a row of the batch. `balance_loss`: whether experts are balanced by a loss. `routed`: the
    rows of each exchange with experts on other ranks, one for each layer and microbatch of this rank, in any order;
    without it, as many for each rank of the axis.
    """
    step = _Step(spec, layout, Place.of(rank, layout), sequence, compute)
    traffic = step.weights()
    if layout.tensor > 1:
        traffic.add(step.over_tensor())
    if layout.context > 1:
        traffic.add(step.over_context(balance_loss=balance_loss))
    if layout.pipeline > 1:
        traffic.add(step.over_pipeline())
    if layout.expert > 1:
        traffic.add(step.over_experts(rank, routed))
    return traffic


def sync_traffic(spec: TransformerSpec, layout: Layout, rank: int, *, sequence: int, form: Form) -> Traffic:
    """What `rank` sends to other copies for one exchange of everything it holds (`train.sync`): of parameters and
    buffers, or under `delayed` of gradients. Local training does so once in `every` steps."""
    step = _Step(spec, layout, Place.of(rank, layout), sequence, torch.float32)
    return copies_traffic(step.messages(), copies=layout.replicate, form=form)


@dataclass(frozen=True, slots=True)
class _Held:
    """A parameter as FSDP2 is given it: the part that the expert and tensor axes leave this rank."""

    unit: str
    message: str
    """What it travels in between copies that train apart: its block, or itself."""
    is_expert: bool
    shape: tuple[int, ...]
    is_summed: bool


class _Step:
    def __init__(
        self, spec: TransformerSpec, layout: Layout, place: Place, sequence: int, compute: torch.dtype
    ) -> None:
        self.spec, self.layout, self.place, self.compute_bytes = spec, layout, place, compute.itemsize
        self.stages = layers_of_rank(spec, layout, place, sequence)
        self.hidden = Hidden(
            rows=layout.microbatch,
            tokens=sequence // layout.context,
            width=spec.width,
            element_bytes=self.compute_bytes,
        )
        self.held = [held for layers in self.stages.values() for held in self._held(layers)]

    def weights(self) -> Traffic:
        """Over the axes replicate and shard: parameters gathered, gradients reduced."""
        layout, traffic = self.layout, Traffic()
        pool = layout.shard * layout.context
        for of, ranks in (("", pool), ("expert ", pool // layout.expert)):
            shard = 1 if layout.zero == 0 else ranks
            traffic.add(
                zero_traffic(
                    self._units(shard, of_experts=bool(of)),
                    zero=layout.zero,
                    shard=shard,
                    replicate=(layout.replicate if layout.sync is None else 1) * ranks // shard,
                    microbatches=layout.accumulate,
                    parameter_bytes=self.compute_bytes,
                    choice=layout.compress,
                    of=of,
                )
            )
        return traffic

    def messages(self) -> list[int]:
        """Elements of what copies exchange, a message a block, and one for each parameter around the blocks."""
        sizes: dict[str, int] = {}
        for held in self.held:
            rows, *others = held.shape
            mine = prod((self._own_rows(rows, held.is_expert), *others))
            sizes[held.message] = sizes.get(held.message, 0) + mine
        if self.spec.router_bias and self.layout.is_local:
            for layers in self.stages.values():
                for layer in layers:
                    sizes[f"layers.{layer} of {layers}"] += self.spec.experts
        return list(sizes.values())

    def over_tensor(self) -> Traffic:
        layout, traffic = self.layout, Traffic()
        for layers in self.stages.values():
            is_last = layers.stop == self.spec.layers
            one = axes.region_traffic(
                self.hidden,
                ranks=layout.tensor,
                sequence=layout.sequence_parallel,
                blocks=len(layers),
                embedding=layers.start == 0,
                head=is_last,
                recompute=layout.recompute,
            )
            if is_last:
                one.add(axes.loss_traffic(self.hidden, ranks=layout.tensor, chunk_rows=vocabulary.CHUNK_ROWS))
            traffic.add(one, times=layout.accumulate)
        traffic.add(
            axes.shared_gradient_traffic(
                (prod(held.shape) for held in self.held if held.is_summed),
                ranks=layout.tensor,
                element_bytes=_FP32_BYTES if self._sums_in_fp32() else self.compute_bytes,
                times=1 if layout.zero <= 1 else layout.accumulate,
            )
        )
        return traffic

    def over_context(self, *, balance_loss: bool) -> Traffic:
        layout, spec, traffic = self.layout, self.spec, Traffic()
        heads = Heads(
            rows=layout.microbatch,
            tokens=self.hidden.tokens,
            heads=spec.heads // layout.tensor,
            kv_heads=max(spec.kv_heads // layout.tensor, 1),
            head_dim=spec.head_dim,
            element_bytes=self.compute_bytes,
        )
        attention = axes.ring_traffic if layout.context_kind == "ring" else axes.ulysses_traffic
        one = attention(heads, ranks=layout.context, recompute=layout.recompute)
        if spec.experts and balance_loss:
            one.add(
                axes.balance_traffic(
                    rows=layout.microbatch,
                    experts=spec.experts,
                    ranks=layout.context,
                    recompute=layout.recompute,
                )
            )
        traffic.add(one, times=self._layers * layout.accumulate)
        return traffic

    def over_pipeline(self) -> Traffic:
        layout, spec = self.layout, self.spec
        divided = layout.tensor if layout.sequence_parallel else 1
        return axes.pipeline_traffic(
            [
                rank_of_stage(layout.schedule, stage, layout.pipeline)
                for stage in range(layout.pipeline * layout.virtual)
            ],
            self.place.pipeline,
            message_bytes=self.hidden.bytes // divided,
            microbatches=layout.accumulate,
            tied_bytes=self._own_vocabulary() * spec.width * _FP32_BYTES if spec.tied else None,
        )

    def over_experts(self, rank: int, routed: Sequence[Routed] | None) -> Traffic:
        layout, spec, traffic = self.layout, self.spec, Traffic()
        rank = rank // layout.tensor % layout.expert  # on the expert axis
        if routed is None:
            rows = self.hidden.rows * self.hidden.tokens * spec.experts_per_token
            even = [_part(rows, layout.expert, index) for index in range(layout.expert)]
            exchange = Routed(tuple(even), (even[rank],) * layout.expert)
            routed = [exchange] * (self._layers * layout.accumulate)
        for exchange in routed:
            traffic.add(
                axes.expert_traffic(
                    exchange,
                    rank,
                    experts=spec.experts,
                    row_bytes=spec.width * self.compute_bytes,
                    recompute=layout.recompute,
                )
            )
        return traffic

    @property
    def _layers(self) -> int:
        return sum(map(len, self.stages.values()))

    def _sums_in_fp32(self) -> bool:
        """FSDP2 widens gradients once it has to keep them until others are added; those it reduces at once it does not.

        A pipeline's it always keeps (`data.shard` has it sum nothing where there is nothing to sum).
        """
        layout = self.layout
        if layout.pipeline > 1:
            return layout.averaged * layout.accumulate > 1
        return layout.zero <= 1 and layout.accumulate > 1

    def _units(self, shard: int, *, of_experts: bool) -> Iterable[Unit]:
        """As `data.shard` makes them, of what each of `shard` ranks holds a part of, padded to equal parts."""
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for held in self.held:
            if held.is_expert == of_experts:
                rows, *others = held.shape
                shapes.setdefault(held.unit, []).append((-(-rows // shard), *others))
        for unit, parts in shapes.items():
            yield Unit(shapes=tuple(parts), regathers=unit.startswith("layers."))

    def _held(self, layers: range) -> Iterator[_Held]:
        with torch.device("meta"):
            model = Transformer(self.spec, layers)
        for name, parameter in model.named_parameters():
            shape = list(parameter.shape)
            is_expert = self.layout.expert > 1 and ".experts." in name
            if is_expert:
                shape[0] //= self.layout.expert
            is_summed = False
            if self.layout.tensor > 1:
                degrees = {"kv_heads": self.spec.kv_heads, "ranks": self.layout.tensor}
                dim = tensor_plan.divided_dim(name, **degrees)
                if dim is not None:
                    shape[dim] = _part(shape[dim], self.layout.tensor, self.place.tensor)
                is_summed = tensor_plan.is_summed(name, **degrees, sequence=self.layout.sequence_parallel)
            yield _Held(
                _unit(name, layers, has_head=model.head is not None),
                f"{_block(name) or name} of {layers}",
                is_expert,
                tuple(shape),
                is_summed,
            )

    def _own_vocabulary(self) -> int:
        """Rows of the embedding that are this rank's in the end."""
        return self._own_rows(_part(self.spec.vocab, self.layout.tensor, self.place.tensor))

    def _own_rows(self, rows: int, is_expert: bool = False) -> int:
        """What ZeRO leaves this rank of a parameter's rows."""
        layout, place = self.layout, self.place
        if layout.zero == 0:
            return rows
        ranks, index = layout.shard * layout.context, place.shard * layout.context + place.context
        if is_expert:
            ranks, index = ranks // layout.expert, index // layout.expert
        return _part(rows, ranks, index)


def _part(size: int, ranks: int, rank: int) -> int:
    """What a rank holds of a dim, as DTensor divides it: equal parts, the last ones smaller."""
    return len(vocabulary.parts(size, ranks)[rank])


def _unit(name: str, layers: range, *, has_head: bool) -> str:
    """A block, an embedding beside a head of its own, or what is left of the stage with these layers (`data.py`)."""
    if block := _block(name):
        return block
    if name.startswith("embed.") and has_head:
        return name
    return f"rest of {layers}"


def _block(name: str) -> str | None:
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else None
