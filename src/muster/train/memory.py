"""One rank's memory in a training step, measured by torch's own accounting beside what the formulas say.

For tests and benchmarks, and for whoever wants to know on his own machine: the step runs as in training, but slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from muster.data.packing import Batch
from muster.observe.memory import KeptActivations, LiveTensors, held_bytes
from muster.parallel.memory import Memory, estimate
from muster.parallel.world import World
from muster.train.forward import to_inputs
from muster.train.plan import Training
from muster.train.trainee import Trainee


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Bytes of one rank, by the components of `parallel.memory.Memory`."""

    parameters_bytes: int
    gathered_bytes: int
    """At most at any time of a forward pass."""
    optimizer_bytes: int
    gradients_bytes: int
    """After the backward passes."""
    activations_bytes: int
    total_bytes: int
    """The peak of all tensors at once, from the model's making to the optimizer's step."""


def measure(training: Training, world: World, batches: Sequence[Batch]) -> Measured:
    """A step on this rank's microbatches of a global batch; every rank must call it."""
    with LiveTensors() as live:
        trainee = Trainee(training, world)
        seen = _Parameters(trainee)
        inputs = [to_inputs(batch, world.device, mask_documents=False) for batch in batches]
        with KeptActivations(seen.now) as kept:
            trainee.model.train(inputs, 1 / training.run.train.batch_tokens)
        gradients_bytes = held_bytes(p.grad for p in seen.now() if p.grad is not None)
        trainee.optimizer.step(training.run.train.optimizer.lr)
    return Measured(
        parameters_bytes=held_bytes(seen.now()),
        gathered_bytes=seen.gathered_bytes,
        optimizer_bytes=held_bytes(trainee.optimizer.state().values()),
        gradients_bytes=gradients_bytes,
        activations_bytes=kept.peak_bytes,
        total_bytes=live.peak_bytes,
    )


def expected(training: Training, world: World) -> Memory:
    """The formulas' figures for this rank."""
    train, layout = training.run.train, training.layout
    return estimate(
        training.spec,
        layout,
        sequence=training.sequence,
        precision=train.precision,
        optimizer=train.optimizer.kind,
        device="cuda" if world.device.type == "cuda" else "cpu",
        pipeline_rank=world.rank // (layout.world // layout.pipeline),
    )


class _Parameters:
    """What a model's modules see as their parameters: this rank's shards, or gathered ones in their place."""

    def __init__(self, trainee: Trainee) -> None:
        self.gathered_bytes = 0
        self._model = trainee.model
        self._shards = {id(shard) for shard in self._held()}

    def now(self) -> list[nn.Parameter]:
        now = self._held()
        gathered_bytes = held_bytes(p for p in now if id(p) not in self._shards)
        self.gathered_bytes = max(self.gathered_bytes, gathered_bytes)
        return now

    def _held(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in [*self._model.named_parameters(), *self._model.copies()]]
