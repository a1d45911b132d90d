"""What to change in a layout so that its ranks need less memory, and how much less by the formulas. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from muster.config import schema
from muster.errors import ConfigError
from muster.model.spec import TransformerSpec
from muster.parallel.layout import Layout, resolve
from muster.parallel.memory import Memory, estimate

Device = Literal["cpu", "cuda"]
_LEAST_SHARE = 0.005
"""Savings below this share of the whole are not worth a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """A change of the run file, and what it saves on the rank that needs most."""

    change: str
    saves_bytes: int


def needs(
    run: schema.Run,
    spec: TransformerSpec,
    layout: Layout,
    *,
    sequence: int,
    device: Device,
    rank: int | None = None,
) -> Memory:
    """Of one rank, or of the one that needs most."""
    places = range(layout.pipeline) if rank is None else [rank // (layout.world // layout.pipeline)]
    found = [
        estimate(
            spec,
            layout,
            sequence=sequence,
            precision=run.train.precision,
            optimizer=run.train.optimizer.kind,
            device=device,
            pipeline_rank=place,
        )
        for place in places
    ]
    return max(found, key=lambda memory: memory.total_bytes)


def savings(
    run: schema.Run,
    spec: TransformerSpec,
    layout: Layout,
    *,
    sequence: int,
    device: Device,
    cores: int,
    gpus: int,
) -> list[Saving]:
    """The legal single changes on the same ranks that save something, the best first."""

    def scarce(candidate: Layout) -> int:
        memory = needs(run, spec, candidate, sequence=sequence, device=device)
        return memory.total_bytes - _elsewhere(memory, candidate, device)

    now, found = scarce(layout), []
    for keys in _candidates(layout):
        try:
            said = replace(_said(layout), **keys)
            other = resolve(replace(run, layout=said), spec, cores=cores, gpus=gpus, ranks=layout.world)
        except (ConfigError, ValueError):  # ValueError: keys that exclude each other
            continue
        change = " ".join(f"layout.{key}={value}" for key, value in keys.items())
        found.append(Saving(change=change, saves_bytes=now - scarce(other)))
    found = [saving for saving in found if saving.saves_bytes > _LEAST_SHARE * now]
    return sorted(found, key=lambda saving: -saving.saves_bytes)


def _elsewhere(memory: Memory, layout: Layout, device: Device) -> int:
    """What offloading takes out of a GPU's memory, or out of the host's into a file."""
    if device == "cuda" and layout.offload != "none":
        return memory.parameters_bytes + memory.optimizer_bytes
    return memory.optimizer_bytes if layout.offload == "disk" else 0


def _candidates(layout: Layout) -> Iterator[dict[str, Any]]:
    if layout.microbatch > 1:
        smaller = max(n for n in range(1, layout.microbatch) if layout.microbatch % n == 0)
        yield {"microbatch": smaller}
    if layout.recompute == "none":
        yield {"recompute": "selective"}
    if layout.recompute != "full":
        yield {"recompute": "full"}
    if layout.shard > 1 and layout.pipeline == 1:
        yield from ({"zero": zero} for zero in (2, 3) if zero > layout.zero)
    if layout.replicate > 1:
        zero = 1 if layout.pipeline > 1 else 3
        yield {"replicate": 1, "shard": layout.replicate * layout.shard, "zero": zero}
    if layout.offload == "none":
        yield from ({"offload": kind} for kind in ("cpu", "disk"))


def _said(layout: Layout) -> schema.Layout:
    """A resolved layout as the run file would say it."""
    names = {field.name for field in fields(schema.Layout)}
    said = {name: getattr(layout, name) for name in names - {"compress", "split", "virtual", "context_kind"}}
    if layout.shard * layout.context == 1:
        said["zero"] = None
    if layout.tensor == 1:
        said["sequence_parallel"] = True
    if layout.context > 1:
        said["context_kind"] = layout.context_kind
    if layout.pipeline > 1:
        said |= {"virtual": layout.virtual, "split": None if layout.split is None else list(layout.split)}
    choice = layout.compress
    compress = replace(
        schema.Layout().compress, gradients=choice.gradients, parameters=choice.parameters, rank=choice.rank
    )
    return schema.Layout(**said, compress=compress)
