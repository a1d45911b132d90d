"""Does a layout train to the numbers of one process? Short runs on both, compared step by step and weight by weight.

Knows how to train a case and how to compare two; `muster verify` chooses the cases and prints the table. Everything is
computed in fp32, where layouts differ by rounding only. The optimizer is the run's, but for its eps: AdamW divides a
gradient by its own size, which turns rounding errors of tiny gradients into whole steps, unless eps is above them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muster.checkpoint.state import WEIGHTS, collect_sums, read_shards, write_shards
from muster.config import schema
from muster.config.load import load_resolved
from muster.data.packing import Batch
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer, named_tensors
from muster.parallel.layout import resolve
from muster.parallel.world import join
from muster.train.loop import microbatch_ranges
from muster.train.plan import Training
from muster.train.trainee import Trainee

TOLERANCE = 1e-5
_EPS = 1e-3
_NEGLIGIBLE = 1e-4
"""A weight smaller than this share of the model's largest one is compared with that share."""
LEAST_SEQUENCES = 16
"""Of a step."""
_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One short training run; plain data, so that ranks can be handed it as a file."""

    run: dict[str, Any]
    """The resolved run, with its layout."""
    spec: TransformerSpec
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What came of a case."""

    losses: list[float]
    gradient_norms: list[float]
    weights: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The largest relative differences of a record from its reference."""

    loss: float
    gradient_norm: float
    weights: float
    worst: str
    """The weight that differs most."""
    first: str | None
    """The first weight, in the model's order, beyond the tolerance."""

    @property
    def ok(self) -> bool:
        return max(self.loss, self.gradient_norm, self.weights) <= TOLERANCE  # nan is beyond any


def scaled(spec: TransformerSpec, layout: schema.Layout | None = None) -> TransformerSpec:
    """A model of the same family and options that trains in seconds, of sizes that `layout` divides."""
    layout = layout or schema.Layout()
    heads = math.lcm(8, layout.tensor * layout.context)
    shared = max(n for n in (1, 2, 4, 8) if n <= max(spec.heads // spec.kv_heads, 1))
    stages = layout.pipeline * (layout.virtual or 2)
    sparse: dict[str, Any] = {
        "experts": math.lcm(8, layout.expert),
        "experts_per_token": min(spec.experts_per_token, 4),
        "expert_ffn": math.lcm(32, layout.tensor),
        "shared_ffn": math.lcm(32, layout.tensor) if spec.shared_ffn else 0,
    }
    return replace(
        spec,
        layers=max(8, stages) if layout.split is None else sum(layout.split),
        width=8 * heads,
        heads=heads,
        kv_heads=heads // shared,
        head_dim=8,
        ffn=math.lcm(128, layout.tensor),
        vocab=509,  # divides by nothing, as vocabularies may
        context=math.lcm(64, 2 * layout.context * layout.tensor),
        window=None if spec.window is None else 24,
        **(sparse if spec.experts else {}),
    )


def sequences_for(layout: schema.Layout) -> int:
    """Sequences of a step that `layout` can share out, a pipeline's ranks getting enough microbatches."""
    data = layout.replicate * layout.shard
    return math.lcm(LEAST_SEQUENCES, data * (2 * layout.pipeline if layout.pipeline > 1 else 1))


def case(
    run: schema.Run,
    spec: TransformerSpec,
    layout: Mapping[str, Any],
    steps: int,
    sequences: int = LEAST_SEQUENCES,
) -> Case:
    """A case of `run` with this layout and `sequences` a step; ConfigError where the layout cannot be."""
    batch_tokens = sequences * spec.context
    optimizer = replace(run.train.optimizer, eps=max(run.train.optimizer.eps, _EPS))
    train = replace(
        run.train,
        tokens=steps * batch_tokens,
        batch_tokens=batch_tokens,
        sequence=None,
        precision="fp32",
        sync=None,
        optimizer=optimizer,
    )
    changed = replace(run, train=train, layout=schema.Layout(**layout))
    resolve(changed, spec, cores=1, gpus=0)
    return Case(run=changed.to_dict(), spec=spec, steps=steps)


def train_case(case: Case, folder: Path) -> None:
    """One rank's part of a case; leaves the record in `folder`."""
    run = load_resolved(case.run)
    with join(_TIMEOUT_S) as world:
        layout = resolve(run, case.spec, cores=1, gpus=0, ranks=world.size)
        training = Training(
            run=run, folder=folder, spec=case.spec, layout=layout, model_folder=None,
            sequence=case.spec.context, steps=case.steps,
        )  # fmt: skip
        trainee = Trainee(training, world)
        updates = []
        for step in range(case.steps):
            whole = batch_of(case, step)
            ranges = microbatch_ranges(training, trainee.mesh.data_index, 0)
            batches = [rows(whole, part) for part in ranges]
            updates.append(trainee.update(step, batches, whole.valid_tokens))
        write_shards(trainee.owned(), folder, world.rank, owns_whole=trainee.mesh.is_first_of_stage)
        world.barrier()
        if world.is_first:
            collect_sums(folder, world.size)
            figures = {
                "losses": [update.loss for update in updates],
                "gradient_norms": [update.gradient_norm for update in updates],
            }
            (folder / "record.json").write_text(json.dumps(figures))


def read_record(case: Case, folder: Path) -> Record:
    """What `train_case` left, the weights whole again."""
    with torch.device("meta"):
        named = list(named_tensors(Transformer(case.spec)))
    weights = {name: torch.empty(tensor.shape) for name, tensor in named}
    read_shards({WEIGHTS + name: tensor for name, tensor in weights.items()}, folder)
    return Record(**json.loads((folder / "record.json").read_text()), weights=weights)


def compare(record: Record, reference: Record) -> Difference:
    """How far a record is from its reference."""
    sizes = {name: _root_mean_square(expected) for name, expected in reference.weights.items()}
    # GPT-2's biases of keys change no output, so what they hold after a step is rounding errors alone.
    floor = _NEGLIGIBLE * max(sizes.values())
    apart = {
        name: _root_mean_square(record.weights[name] - expected) / max(sizes[name], floor)
        for name, expected in reference.weights.items()
    }
    worst = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
    return Difference(
        loss=_apart(record.losses, reference.losses),
        gradient_norm=_apart(record.gradient_norms, reference.gradient_norms),
        weights=apart[worst],
        worst=worst,
        first=next((name for name, value in apart.items() if not value <= TOLERANCE), None),
    )


def batch_of(case: Case, step: int) -> Batch:
    """The global batch of a step: random tokens, packed documents, some targets that are not scored."""
    generator = np.random.default_rng([case.run["train"]["seed"], step])
    shape = (case.run["train"]["batch_tokens"] // case.spec.context, case.spec.context)
    tokens = generator.integers(0, case.spec.vocab, shape, dtype=np.int64)
    targets = generator.integers(0, case.spec.vocab, shape, dtype=np.int64)
    targets[generator.random(shape) < 0.1] = -100
    documents = np.cumsum(generator.random(shape) < 0.04, axis=1, dtype=np.int32)
    return Batch(tokens, targets, documents)


def rows(batch: Batch, which: range) -> Batch:
    """Some sequences of a batch."""
    part = slice(which.start, which.stop)
    return Batch(batch.tokens[part], batch.targets[part], batch.documents[part])


def _root_mean_square(weight: Tensor) -> float:
    return float(weight.double().square().mean().sqrt())


def _apart(ours: list[float], theirs: list[float]) -> float:
    found = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return math.nan if any(map(math.isnan, found)) else max(found)
