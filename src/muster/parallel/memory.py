"""Bytes of one rank at its peak, by component, from the model's and the layout's figures: before anything is started.

Pure; knows no torch. Sizes are those of tensors; what an allocator rounds up or caches, and the process itself, come on
top. Parameters, gradients and optimizer state follow ZeRO's table in `data.py` (Rajbhandari et al. 2020), activations
what the model's modules keep (`activations.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from muster.model.spec import TransformerSpec
from muster.parallel import stages
from muster.parallel.activations import FP32, Activations
from muster.parallel.layout import Layout
from muster.parallel.schedules import SCHEDULES, in_flight, stages_of_rank
from muster.parallel.shapes import Unit, units

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank, each component at its own peak."""

    parameters_bytes: int
    """fp32 masters, this rank's shards; on the host under offload."""
    gathered_bytes: int
    """Copies to compute with: of all units, under ZeRO-3 of the outermost and one block."""
    optimizer_bytes: int
    """On the host under offload, in a file under offload to disk."""
    gradients_bytes: int
    """Shards in fp32 once reduced; where that is at a step's end only, the whole sums over microbatches."""
    activations_bytes: int
    """Kept for the backward pass, by all microbatches in flight."""
    pipeline_bytes: int
    """Buffers in which hidden states and their gradients arrive, and hidden states that were sent."""
    forward_bytes: int
    """Transient while activations are kept: the logits of a chunk, and under ZeRO-3 the next block arriving."""
    backward_bytes: int
    """Transient in a block's backward pass: what is computed again and gradients of its activations, and after them the
    gradients of its parameters as computed and as sent."""
    closing_bytes: int
    """Transient at the end of a backward pass: the gradients of embedding, norm and head, as computed and as sent."""
    returning_bytes: int
    """Activations that are kept while the gradients of earlier microbatches are there already."""

    @property
    def total_bytes(self) -> int:
        """The peak. In a backward pass activations go as gradients come, so it is at one end of it; the last one of a
        step drops gathered parameters on the way."""
        states = self.parameters_bytes + self.optimizer_bytes + self.pipeline_bytes
        computing = states + self.gathered_bytes
        transient = max(self.forward_bytes, self.backward_bytes)
        later = transient if self.returning_bytes == self.activations_bytes else self.backward_bytes
        again = self.returning_bytes + self.gradients_bytes + later if self.returning_bytes else 0
        return max(
            computing + max(self.activations_bytes + transient, again),
            states + self.gradients_bytes + max(self.closing_bytes, self.backward_bytes),
        )


def estimate(
    spec: TransformerSpec,
    layout: Layout,
    *,
    sequence: int,
    precision: Literal["bf16", "fp32"],
    optimizer: Literal["adamw", "muon"] = "adamw",
    device: Literal["cpu", "cuda"] = "cpu",
    pipeline_rank: int = 0,
    sync_copies: float = 0,
) -> Memory:
    """A rank of that place on the pipeline axis, training on sequences of `sequence` tokens.

    Ranks that differ in their other places need the same, but for parameters and experts that do not divide evenly:
    the estimate is that of the rank with most of a parameter, and of experts with an even load. `sync_copies`: how many
    times its parameters' size `train.sync` adds to the optimizer's state.
    """
    compute = COMPUTE_BYTES[precision]
    parts = _layers_of_rank(spec, layout, sequence, pipeline_rank)
    held = [unit for layers in parts.values() for unit in units(spec, layout, layers)]
    one = Activations(spec, layout, sequence, compute, device)
    of_stage = {stage: one.stage(layers) for stage, layers in parts.items()}

    def kept(counts: Mapping[int, int]) -> int:
        return sum(count * of_stage[stage] for stage, count in counts.items())

    flying = max(_in_flight(layout, pipeline_rank), key=kept)
    activations = kept(flying)
    if not one.places_tokens:
        activations += one.angles()
    return Memory(
        parameters_bytes=FP32 * sum(unit.shard_elements for unit in held),
        gathered_bytes=compute * _gathered(held, layout),
        optimizer_bytes=FP32 * sum(_moment_elements(unit, optimizer) for unit in held)
        + round(FP32 * sync_copies * sum(unit.shard_elements for unit in held)),
        gradients_bytes=FP32 * sum(_gradient_elements(unit, layout) for unit in held),
        activations_bytes=activations,
        pipeline_bytes=_pipeline(one, parts, flying, layout),
        forward_bytes=_logits(one, parts) + compute * _arriving(held, layout),
        backward_bytes=max(
            one.recomputed() + _activation_gradients(one, parts),
            max(_reduction(unit, layout, compute) for unit in held if unit.layer is not None),
        ),
        closing_bytes=max(_closing(unit, layout, compute) for unit in held if unit.layer is None),
        returning_bytes=_returning(activations, flying, layout),
    )


def _layers_of_rank(spec: TransformerSpec, layout: Layout, sequence: int, rank: int) -> dict[int, range]:
    count = layout.pipeline * layout.virtual
    if layout.split is None:
        ranges = stages.split(stages.costs(spec, sequence), count)
    else:
        ranges = stages.explicit(layout.split)
    own = stages_of_rank(layout.schedule, rank, layout.pipeline, layout.virtual)
    return {stage: ranges[stage] for stage in own}


def _in_flight(layout: Layout, rank: int) -> list[dict[int, int]]:
    if layout.pipeline == 1:
        return [{0: 1}]
    return in_flight(
        layout.schedule,
        rank,
        ranks=layout.pipeline,
        stages_per_rank=layout.virtual,
        microbatches=layout.accumulate,
    )


def _returning(activations: int, flying: Mapping[int, int], layout: Layout) -> int:
    """All where another forward pass follows the first backward pass; else what the latter leaves."""
    rounds = layout.accumulate * len(flying)
    if rounds > sum(flying.values()):
        return activations
    return activations * (rounds - 1) // rounds


def _gathered(held: Sequence[Unit], layout: Layout) -> int:
    """Elements: all units, or under ZeRO-3 the outermost and a block."""
    if layout.zero < 3:
        return sum(unit.elements for unit in held)
    of = {
        layer: sum(unit.elements for unit in held if unit.layer == layer) for layer in {u.layer for u in held}
    }
    return of.pop(None) + max(of.values())


def _arriving(held: Sequence[Unit], layout: Layout) -> int:
    """Elements of the unit that is on its way while another is in use."""
    return max(unit.elements for unit in held if unit.layer is not None) if layout.zero == 3 else 0


def sums_whole_gradients(layout: Layout) -> bool:
    """Whether microbatches' gradients are summed before they are reduced: by ZeRO 0 and 1 (all that pipelines run)."""
    return layout.accumulate > 1 and layout.zero <= 1


def _gradient_elements(unit: Unit, layout: Layout) -> int:
    return unit.elements if sums_whole_gradients(layout) else unit.shard_elements


def _moment_elements(unit: Unit, optimizer: str) -> int:
    """AdamW keeps two moments; Muon keeps one of each matrix of a block, and of the rest AdamW's two."""

    def moments(name: str, ndim: int) -> int:
        is_hidden = name.startswith("layers.") and ndim >= 2 and ".router." not in name
        return 1 if optimizer == "muon" and is_hidden else 2

    return sum(moments(name, len(shape)) * unit.shard_of(shape) for name, shape in unit.shapes.items())


def _reduction(unit: Unit, layout: Layout, compute: int) -> int:
    """A unit's gradients as computed, and as sent in fp32."""
    as_computed = 0 if sums_whole_gradients(layout) else compute
    return unit.elements * (as_computed + FP32)


def _closing(unit: Unit, layout: Layout, compute: int) -> int:
    """The same for the last unit, beside all gradients: where ranks do not share it, what is sent is its gradient."""
    computed = FP32 if sums_whole_gradients(layout) else compute
    if unit.shard == 1:
        return unit.elements * computed
    return (
        max(unit.elements * computed, unit.shard_elements * FP32)
        + (unit.elements - unit.shard_elements) * FP32
    )


def _activation_gradients(one: Activations, parts: Mapping[int, range]) -> int:
    """Those within a block; where a schedule splits the backward pass, for a stage those that its weights wait for."""
    if one.layout.pipeline == 1 or not SCHEDULES[one.layout.schedule].splits_backward:
        return one.gradients()
    return one.gradients() + max(map(len, parts.values())) * one.output_gradients()


def _logits(one: Activations, parts: Mapping[int, range]) -> int:
    return one.logits() if any(layers.stop == one.spec.layers for layers in parts.values()) else 0


def _pipeline(one: Activations, parts: Mapping[int, range], flying: Mapping[int, int], layout: Layout) -> int:
    if layout.pipeline == 1:
        return 0
    last = layout.pipeline * layout.virtual - 1
    hidden = 0
    for stage in parts:
        # Buffers for every microbatch; those in flight are counted as the first block's input.
        hidden += 0 if stage == 0 else layout.accumulate - flying[stage]
        hidden += 0 if stage == last else layout.accumulate + flying[stage]
    return hidden * one.hidden
