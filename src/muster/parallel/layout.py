"""From `layout:` in the run file to degrees that fit the batch and the machine; pure, and explained.

Everything is decided before a rank is started: a layout that does not divide the batch
is refused here, with the nearest legal values. Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from muster.config import schema
from muster.errors import ConfigError

_CPU_MICROBATCH_TOKENS = 2048
_GPU_MICROBATCH_TOKENS = 16384


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Resolved degrees: world size is replicate x shard, and every rank gets the same number of sequences."""

    replicate: int
    shard: int
    zero: Literal[0, 1, 2, 3]
    recompute: Literal["none", "full"]
    microbatch: int
    """Sequences of one forward pass on one rank."""
    accumulate: int
    """Forward passes of one rank in one step."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where parameters, gradients and optimizer state live between uses; disk is for the moments alone."""
    reason: str
    """Why these values, in a few words, for the run's log."""

    @property
    def world(self) -> int:
        return self.replicate * self.shard

    def __str__(self) -> str:
        axes = f"replicate {self.replicate} x shard {self.shard}, zero {self.zero}"
        offload = "" if self.offload == "none" else f", offload {self.offload}"
        return (
            f"{axes}, recompute {self.recompute}{offload}, microbatch {self.microbatch} x {self.accumulate}"
        )


def sequences_per_batch(train: schema.Train, context: int) -> int:
    """Sequences in one global batch; refuses a sequence beyond the context and a batch that does not divide."""
    sequence = train.sequence or context
    if sequence > context:
        raise ConfigError(
            [
                f"train.sequence: {sequence} tokens exceed the model's context of {context}; use {context} or less"
            ]
        )
    if train.batch_tokens % sequence:
        below = train.batch_tokens // sequence * sequence
        near = [str(n) for n in (below, below + sequence) if n]
        raise ConfigError(
            [
                f"train.batch_tokens: {train.batch_tokens} is not a multiple of the sequence length {sequence}: "
                f"nearest legal values are {' and '.join(near)}"
            ]
        )
    return train.batch_tokens // sequence


def resolve(run: schema.Run, *, context: int, cores: int, gpus: int, ranks: int | None = None) -> Layout:
    """Resolve `layout:` for a machine with `cores` physical cores and `gpus` GPUs.

    `ranks` is the world size where somebody else has already started the ranks (`torchrun`).
    """
    sequences = sequences_per_batch(run.train, context)
    said = run.layout
    if isinstance(said, str):
        world, why = _auto_world(sequences, cores=cores, gpus=gpus, ranks=ranks)
        said = schema.Layout(replicate=world)
    else:
        world, why = said.replicate * said.shard, "as written in the run file"
        if ranks is not None and ranks != world:
            raise ConfigError(
                [
                    f"layout: replicate {said.replicate} x shard {said.shard} needs {world} ranks, but {ranks} were "
                    f"started; start {world}, or write layout: auto"
                ]
            )
    sequence = run.train.sequence or context
    if sequences % world:
        legal = [n for n in range(1, sequences + 1) if sequences % n == 0]
        raise ConfigError(
            [
                f"layout: {world} ranks do not divide the batch of {sequences} sequences; use "
                f"{_nearest(world, legal)} ranks, or train.batch_tokens={_round_up(sequences, world) * sequence}"
            ]
        )
    per_rank = sequences // world
    if said.microbatch is not None and per_rank % said.microbatch:
        legal = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
        raise ConfigError(
            [
                f"layout.microbatch: {said.microbatch} does not divide the {per_rank} sequences of a rank: "
                f"nearest legal values are {_nearest(said.microbatch, legal)}"
            ]
        )
    microbatch = said.microbatch
    if microbatch is None:
        budget = _GPU_MICROBATCH_TOKENS if gpus else _CPU_MICROBATCH_TOKENS
        microbatch = max(
            n for n in range(1, per_rank + 1) if per_rank % n == 0 and (n == 1 or n * sequence <= budget)
        )
        why += f"; microbatch {microbatch}: the most sequences within {budget} tokens"
    default_zero: Literal[0, 1] = 0 if said.shard == 1 else 1
    return Layout(
        replicate=said.replicate,
        shard=said.shard,
        zero=default_zero if said.zero is None or said.shard == 1 else said.zero,
        recompute=said.recompute,
        microbatch=microbatch,
        accumulate=per_rank // microbatch,
        offload=said.offload,
        reason=why,
    )


def _auto_world(sequences: int, *, cores: int, gpus: int, ranks: int | None) -> tuple[int, str]:
    if ranks is not None:
        return ranks, f"auto: {ranks} ranks were started"
    if gpus:
        world = max(n for n in range(1, gpus + 1) if sequences % n == 0)
        return world, f"auto: one rank for each of {world} GPUs"
    world = max(n for n in range(1, cores + 1) if sequences % n == 0)
    return world, (
        f"auto: {world} of {cores} cores, one rank with one thread each (measured: 1.07x as fast at 10 M "
        f"parameters as one rank with two threads)"
    )


def _nearest(value: int, legal: list[int]) -> str:
    below = [n for n in legal if n < value][-1:]
    above = [n for n in legal if n > value][:1]
    return " or ".join(str(n) for n in below + above)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
