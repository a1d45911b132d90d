"""From `layout:` in the run file to degrees that fit the model, the batch and the machine; pure, and explained.

Everything is decided before a rank is started: a layout that cannot work is refused here, all of its
problems at once, with the nearest legal values. Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from muster.comm.choice import Choice
from muster.comm.choice import problems as compression_problems
from muster.config import schema
from muster.errors import ConfigError
from muster.model.spec import TransformerSpec
from muster.parallel import context
from muster.parallel.schedules import SCHEDULES, schedule_problems
from muster.parallel.stages import split_problems

_CPU_MICROBATCH_TOKENS = 2048
_GPU_MICROBATCH_TOKENS = 16384
_PIPELINE_MICROBATCHES = 4
"""Microbatches for each pipeline rank that an automatic choice aims at: the bubble is then about a fifth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Resolved degrees; the world is their product, and each part of the batch has the same number of sequences."""

    replicate: int
    shard: int
    zero: Literal[0, 1, 2, 3]
    tensor: int = 1
    sequence_parallel: bool = True
    context: int = 1
    context_kind: Literal["ring", "ulysses"] = "ring"
    expert: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    split: tuple[int, ...] | None = None
    recompute: Literal["none", "selective", "full"]
    microbatch: int
    """Sequences of one forward pass on one rank."""
    accumulate: int
    """Forward passes of one rank in one step."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where parameters, gradients and optimizer state live between uses; disk is for the moments alone."""
    compress: Choice = field(default_factory=Choice)
    bucket: int = 1
    prefetch: int = 1
    sync: Literal["local_sgd", "diloco", "delayed"] | None = None
    """How copies stay together; None: gradients are summed over them every step."""
    reason: str
    """Why these values, in a few words, for the run's log."""

    @property
    def world(self) -> int:
        return self.data * self.context * self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Parts that the global batch is divided into."""
        return self.replicate * self.shard

    @property
    def averaged(self) -> int:
        """Ranks whose gradients are averaged within a step's passes: those that hold the same parameters."""
        return (self.data if self.sync is None else self.shard) * self.context

    @property
    def is_local(self) -> bool:
        """Each copy on the replicate axis takes steps of its own (`train.sync`), with a loss and a norm of its own."""
        return self.sync in ("local_sgd", "diloco")

    def __str__(self) -> str:
        axes = f"replicate {self.replicate} x shard {self.shard}"
        for axis in ("context", "tensor", "pipeline"):
            if getattr(self, axis) > 1:
                axes += f" x {axis} {getattr(self, axis)}"
        words = [axes, f"zero {self.zero}"]
        if self.expert > 1:
            words.append(f"expert {self.expert}")
        if self.context > 1:
            words.append(self.context_kind)
        if self.pipeline > 1:
            words.append(self.schedule)
        words.append(f"recompute {self.recompute}")
        if self.offload != "none":
            words.append(f"offload {self.offload}")
        if self.compress.gradients != "none":
            words.append(f"gradients {self.compress.gradients}")
        if self.compress.parameters != "none":
            words.append(f"parameters {self.compress.parameters}")
        if self.sync is not None:
            words.append(self.sync)
        words += [f"microbatch {self.microbatch} x {self.accumulate}"]
        return ", ".join(words)


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


def resolve(
    run: schema.Run, spec: TransformerSpec, *, cores: int, gpus: int, ranks: int | None = None
) -> Layout:
    """Resolve `layout:` for a model on a machine with `cores` physical cores and `gpus` GPUs.

    `ranks` is the world size where somebody else has already started the ranks (`torchrun`).
    """
    sequences = sequences_per_batch(run.train, spec.context)
    sequence = run.train.sequence or spec.context
    said = run.layout
    if isinstance(said, str):
        world, why = _auto_world(sequences, cores=cores, gpus=gpus, ranks=ranks)
        said = schema.Layout(replicate=world)
    else:
        why = "as written in the run file"
    _refuse(_problems(said, spec, sequences, sequence, ranks))
    if run.train.sync is not None:
        _refuse(_sync_problems(said, run.train.sync, spec))
    per_rank = sequences // (said.replicate * said.shard)
    microbatch = said.microbatch
    if microbatch is None:
        microbatch, chosen = _microbatch(per_rank, sequence // said.context, said, gpus)
        why += f"; {chosen}"
    kind = said.context_kind
    if kind is None:
        kind, chosen = context.choose(spec.heads // said.tensor, _local_kv_heads(said, spec), said.context)
        why += f"; {chosen}" if said.context > 1 else ""
    _refuse(_schedule_problems(said, per_rank, microbatch))
    # Context ranks are copies to ZeRO 0, but not copies that train apart.
    divides = said.shard if run.train.sync is None else said.shard * said.context
    default_zero: Literal[0, 1] = 0 if divides == 1 else 1
    return Layout(
        replicate=said.replicate,
        shard=said.shard,
        zero=default_zero if said.zero is None or said.shard * said.context == 1 else said.zero,
        tensor=said.tensor,
        sequence_parallel=said.sequence_parallel and said.tensor > 1,
        context=said.context,
        context_kind=kind,
        expert=said.expert,
        pipeline=said.pipeline,
        schedule=said.schedule,
        virtual=_virtual(said),
        split=None if said.split is None else tuple(said.split),
        recompute=said.recompute,
        microbatch=microbatch,
        accumulate=per_rank // microbatch,
        offload=said.offload,
        compress=_choice(said),
        bucket=said.bucket,
        prefetch=said.prefetch,
        sync=None if run.train.sync is None else run.train.sync.kind,
        reason=why,
    )


def division_problems(spec: TransformerSpec, tensor: int, pipeline: int) -> Iterator[str]:
    """What keeps a model from being served by so many ranks, each as `.key: sentence` with the nearest legal values."""
    said = schema.Layout(tensor=tensor, pipeline=pipeline, sequence_parallel=False)
    yield from _tensor_problems(said, spec, spec.context, [])
    for problem in split_problems(spec.layers, pipeline):
        yield f".pipeline: {problem}"


def _refuse(problems: Iterable[str]) -> None:
    found = [f"layout{problem}" for problem in problems]
    if found:
        raise ConfigError(found)


def _problems(
    said: schema.Layout, spec: TransformerSpec, sequences: int, sequence: int, ranks: int | None
) -> Iterator[str]:
    """What cannot work, each as `.key: sentence` or `: sentence`, with the nearest legal values."""
    data = said.replicate * said.shard
    world = data * said.context * said.tensor * said.pipeline
    if ranks is not None and ranks != world:
        yield f": {_product(said)} needs {world} ranks, but {ranks} were started; start {world}, or write layout: auto"
    if sequences % data:
        legal = _divisors(sequences)
        yield (
            f": {data} ranks do not divide the batch of {sequences} sequences; use {_nearest(data, legal)} ranks, "
            f"or train.batch_tokens={_round_up(sequences, data) * sequence}"
        )
    elif said.microbatch is not None and (sequences // data) % said.microbatch:
        legal = _divisors(sequences // data)
        yield (
            f".microbatch: {said.microbatch} does not divide the {sequences // data} sequences of a rank: "
            f"nearest legal values are {_nearest(said.microbatch, legal)}"
        )
    lengths = [
        n
        for n in range(1, spec.context + 1)
        if sequences * sequence % n == 0 and sequences * sequence // n % data == 0
    ]
    yield from _tensor_problems(said, spec, sequence, lengths)
    if said.context > 1 and spec.heads % said.tensor == 0:
        kind = said.context_kind or "ring"  # the automatic choice is ring where ulysses cannot be
        for problem in context.problems(
            sequence, spec.heads, said.tensor, said.context, kind, lengths=lengths
        ):
            yield problem.removeprefix("layout")
    yield from _expert_problems(said, spec)
    if said.pipeline > 1:
        for problem in split_problems(spec.layers, said.pipeline * _virtual(said), said.split):
            yield f".pipeline: {problem}"
    copies, parts = said.replicate, said.shard * said.context
    if said.zero == 0 or (said.zero is None and said.shard == 1):
        copies, parts = copies * parts, 1
    for problem in compression_problems(_choice(said), replicate=copies, shard=parts):
        yield problem.removeprefix("layout")


def _sync_problems(said: schema.Layout, sync: schema.Sync, spec: TransformerSpec) -> Iterator[str]:
    if said.replicate == 1:
        yield (
            f".replicate: train.sync {sync.kind} is between copies, but there is one: use 2 or more, or remove "
            f"train.sync"
        )
    if said.zero == 0 and said.context > 1:
        yield ".zero: under train.sync the ranks of a context share their state: use zero: 1 or more"
    if sync.fragments > spec.layers:
        yield (
            f": train.sync.fragments ({sync.fragments}) are groups of layers, of which there are {spec.layers}: use "
            f"{spec.layers} or less"
        )
    form = said.compress.gradients
    if form == "powersgd" or (form != "none" and said.shard * said.context == 1):
        yield (
            f".compress.gradients: {form} compresses what is summed in a step's passes, which under train.sync is "
            f"nothing between copies: remove it, or use train.sync.compress"
        )


def _tensor_problems(
    said: schema.Layout, spec: TransformerSpec, sequence: int, lengths: list[int]
) -> Iterator[str]:
    if said.tensor == 1:
        return
    sizes = {"heads": spec.heads}
    sizes |= (
        {"expert_ffn": spec.expert_ffn, "shared_ffn": spec.shared_ffn} if spec.experts else {"ffn": spec.ffn}
    )
    local = sequence // said.context
    possible = [n for n in _divisors(math.gcd(*sizes.values())) if _shares_kv_heads(n, spec)]
    legal = [n for n in possible if local % n == 0] if said.sequence_parallel else possible
    for name, size in sizes.items():
        if size % said.tensor:
            yield f".tensor: {said.tensor} does not divide {name} ({size}): {_legal(said.tensor, legal)}"
    if not _shares_kv_heads(said.tensor, spec):
        yield (
            f".tensor: {said.tensor} ranks can neither divide nor share the {spec.kv_heads} kv_heads: "
            f"{_legal(said.tensor, legal)}"
        )
    if said.tensor in possible and said.tensor not in legal:
        others = _nearest(sequence, [n for n in lengths if n % (said.tensor * said.context) == 0])
        change = f"change train.sequence to {others}, or " if others else ""
        yield (
            f".tensor: {said.tensor} does not divide a rank's {local} tokens of a sequence: {change}"
            f"set sequence_parallel: false"
        )


def _shares_kv_heads(tensor: int, spec: TransformerSpec) -> bool:
    return spec.kv_heads % tensor == 0 or tensor % spec.kv_heads == 0


def _local_kv_heads(said: schema.Layout, spec: TransformerSpec) -> int:
    """Kv heads of one tensor rank."""
    return max(spec.kv_heads // said.tensor, 1)


def _expert_problems(said: schema.Layout, spec: TransformerSpec) -> Iterator[str]:
    if said.expert == 1:
        return
    if spec.experts == 0:
        yield f".expert: {said.expert} ranks have no experts to divide: the {spec.family} model has none; leave it out"
        return
    pool = said.shard * said.context
    legal = _legal(said.expert, _divisors(math.gcd(spec.experts, pool)))
    if spec.experts % said.expert:
        yield f".expert: {said.expert} does not divide the {spec.experts} experts of a layer: {legal}"
    if pool % said.expert:
        yield f".expert: {said.expert} does not divide shard x context ({pool}), which it is taken from: {legal}"


def _schedule_problems(said: schema.Layout, per_rank: int, microbatch: int) -> Iterator[str]:
    if said.pipeline == 1:
        return
    for problem in schedule_problems(
        said.schedule,
        ranks=said.pipeline,
        stages_per_rank=_virtual(said),
        microbatches=per_rank // microbatch,
        sequences=per_rank,
        recompute=said.recompute == "full",  # attention alone has no weights
    ):
        yield f".schedule: {problem}"


def _choice(said: schema.Layout) -> Choice:
    compress = said.compress
    return Choice(gradients=compress.gradients, parameters=compress.parameters, rank=compress.rank)


def _virtual(said: schema.Layout) -> int:
    """Stages of one pipeline rank."""
    if said.pipeline == 1:
        return 1
    return SCHEDULES[said.schedule].stages_per_rank if said.virtual is None else said.virtual


def _microbatch(per_rank: int, tokens: int, said: schema.Layout, gpus: int) -> tuple[int, str]:
    """The most sequences within a budget of tokens, and why; a pipeline wants enough microbatches to fill it."""
    budget = _GPU_MICROBATCH_TOKENS if gpus else _CPU_MICROBATCH_TOKENS
    fitting = [n for n in _divisors(per_rank) if n == 1 or n * tokens <= budget]
    reason = f"the most sequences within {budget} tokens"
    if not gpus:
        # At 10 M parameters: benchmarks/results/microbatch_cpu.json
        reason += " (measured: 1.18x as fast as 512 tokens, while 4096 take 1.4x the memory for 1.1x)"
    if said.pipeline > 1:
        wanted = min(_PIPELINE_MICROBATCHES * said.pipeline, per_rank)
        fitting = [n for n in fitting if per_rank // n >= wanted] or [1]
        reason += f" that leave {wanted} microbatches for {said.pipeline} pipeline ranks"
    return fitting[-1], f"microbatch {fitting[-1]}: {reason}"


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


def _product(said: schema.Layout) -> str:
    axes = ("context", "tensor", "pipeline")
    more = "".join(f" x {axis} {getattr(said, axis)}" for axis in axes if getattr(said, axis) > 1)
    return f"replicate {said.replicate} x shard {said.shard}{more}"


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]


def _legal(value: int, legal: list[int]) -> str:
    return f"nearest legal values are {_nearest(value, legal)}"


def _nearest(value: int, legal: list[int]) -> str:
    below = [n for n in legal if n < value][-1:]
    above = [n for n in legal if n > value][:1]
    return " or ".join(str(n) for n in below + above)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
