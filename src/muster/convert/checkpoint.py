"""A checkpoint of another trainer as one of a run, which `muster train` resumes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from muster.checkpoint import shelf
from muster.checkpoint.state import WEIGHTS, collect_sums, write_shards
from muster.convert.source import KINDS, Source, refuse_other_model
from muster.errors import UsageError
from muster.model.transformer import Transformer, named_tensors
from muster.train.describe import describe
from muster.train.plan import Plan

_FILE_BYTES = 2_000_000_000


def refuse_misfit(source: Source, plan: Plan) -> None:
    """UsageError where the run of `plan` cannot go on from `source`."""
    run = plan.run
    if source.missing_moments is not None:
        raise UsageError(
            f"{source.label} cannot be trained on: {source.missing_moments}; convert it to a folder instead, and start "
            f"a run from its weights (model.from)"
        )
    if run.train.optimizer.kind != "adamw":
        raise UsageError(
            f"{source.label} holds the moments of Adam, but train.optimizer.kind is {run.train.optimizer.kind}: write "
            f"adamw, or start from its weights alone"
        )
    if source.spec is not None:
        refuse_other_model(source.spec, plan.spec, source.label)
    if not 0 < source.steps < plan.steps:
        raise UsageError(
            f"{source.label} has done {source.steps} updates, and run '{run.name}' ends after {plan.steps}: set "
            f"train.tokens to more than {max(source.steps, 1) * run.train.batch_tokens}"
        )
    if shelf.steps(plan.folder / "checkpoints"):
        raise UsageError(f"{plan.folder} has checkpoints already: give the run another name")


def write_checkpoint(source: Source, plan: Plan) -> Path:
    """Weights and moments of `source` on the shelf of a run; a few tensors at a time are in memory."""
    kept = plan.folder / "checkpoints"
    partial = shelf.partial_of(kept, source.steps)
    shelf.sweep(kept)
    partial.mkdir(parents=True)
    try:
        files = 0
        for group in _groups(source, plan):
            write_shards(group, partial, files, owns_whole=True)
            files += 1
        content = describe(plan, source.steps, collect_sums(partial, files))
        content.versions["converted"] = source.label
        return shelf.commit(kept, source.steps, content)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _groups(source: Source, plan: Plan) -> Iterator[dict[str, Tensor]]:
    """All tensors of the checkpoint, as many at a time as go into one file."""
    with torch.device("meta"):
        model = Transformer(plan.spec)
    group: dict[str, Tensor] = {}
    size_bytes = 0
    for kind in KINDS:
        value = source.values(kind, plan.spec)
        for name, tensor in named_tensors(model) if kind == "weights" else model.named_parameters():
            if group and size_bytes + 4 * tensor.numel() > _FILE_BYTES:
                yield group
                group, size_bytes = {}, 0
            group[WEIGHTS + name if kind == "weights" else f"{kind}.{name}"] = value(name, tensor.shape)
            size_bytes += 4 * tensor.numel()
    yield group
