"""One rank's memory, measured in real training steps: what the formulas of `parallel/memory.py` have to give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from muster.config import schema
from muster.config.load import load_resolved
from muster.data.packing import Batch
from muster.model.spec import TransformerSpec
from muster.observe.memory import KeptActivations, LiveTensors, held_bytes
from muster.parallel.layout import resolve
from muster.parallel.memory import Memory, estimate, sums_whole_gradients
from muster.parallel.world import join
from muster.train.plan import Training
from muster.train.trainee import Trainee
from tests.toy import tiny


@dataclass(frozen=True, kw_only=True)
class Measured:
    parameters_bytes: int
    gathered_bytes: int
    gradients_bytes: int
    """After the backward passes."""
    optimizer_bytes: int
    activations_bytes: int
    peak_bytes: int
    """Of everything at once, in a whole step."""
    reduced_each_microbatch: bool
    said: Memory
    """The formulas' figures for this rank."""


def measure(run: dict[str, Any], spec: TransformerSpec, sequences: int) -> Measured:
    """This rank's memory in a step on a global batch of `sequences`."""
    with join() as world:
        made = load_resolved(tiny(**run))
        batch_tokens = sequences * spec.context
        made = replace(made, train=replace(made.train, tokens=2 * batch_tokens, batch_tokens=batch_tokens))
        training = training_of(made, spec, world.size)
        gathered = Gathered()
        with LiveTensors() as live:
            trainee = Trainee(training, world)
            gathered.watch(trainee)
            with KeptActivations(gathered.parameters) as kept:
                inputs = [trainee._inputs(batch) for batch in batches(spec, training.layout)]
                trainee.model.train(inputs, 1 / batch_tokens)
            gradients = held_bytes(p.grad for _, p in trainee.model.named_parameters() if p.grad is not None)
            trainee.optimizer.step(1e-3)
        return Measured(
            parameters_bytes=held_bytes(gathered.parameters()),
            gathered_bytes=gathered.peak_bytes,
            gradients_bytes=gradients,
            optimizer_bytes=held_bytes(trainee.optimizer.state().values()),
            activations_bytes=kept.peak_bytes,
            peak_bytes=live.peak_bytes,
            reduced_each_microbatch=not sums_whole_gradients(training.layout),
            said=estimate(
                spec,
                training.layout,
                sequence=spec.context,
                precision=made.train.precision,
                optimizer=made.train.optimizer.kind,
                pipeline_rank=trainee.mesh.place.pipeline,
            ),
        )


class Gathered:
    """What a model's modules see as their parameters, looked at whenever autograd saves something."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._shards: set[int] = set()

    def watch(self, trainee: Trainee) -> None:
        self._parts = list(trainee.model._parts.values())
        self._shards = {id(shard) for shard in self._now()}

    def parameters(self) -> list[nn.Parameter]:
        now = self._now()
        self.peak_bytes = max(self.peak_bytes, held_bytes(p for p in now if id(p) not in self._shards))
        return now

    def _now(self) -> list[nn.Parameter]:
        return [parameter for part in self._parts for parameter in part.parameters()]


def training_of(run: schema.Run, spec: TransformerSpec, ranks: int) -> Training:
    layout = resolve(run, spec, cores=1, gpus=0, ranks=ranks)
    return Training(
        run=run, folder=Path(), spec=spec, layout=layout, attention="", model_folder=None,
        sequence=spec.context, steps=2,
    )  # fmt: skip


def batches(spec: TransformerSpec, layout: Any) -> list[Batch]:
    """A rank's microbatches of one step."""
    generator = np.random.default_rng(0)
    shape = (layout.microbatch, spec.context)
    return [
        Batch(
            generator.integers(0, spec.vocab, shape, dtype=np.int64),
            generator.integers(0, spec.vocab, shape, dtype=np.int64),
            np.zeros(shape, dtype=np.int32),
        )
        for _ in range(layout.accumulate)
    ]
