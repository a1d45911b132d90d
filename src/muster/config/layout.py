"""The `layout:` section of the run file: how the model and the batch are spread over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from muster.config.fields import STRICT, Flag, Positive

_OF_PIPELINES = {"split": None, "virtual": None, "schedule": "1f1b"}
"""Keys that mean nothing without a pipeline, and what they are then."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Compress:
    """In what form gradients and parameters travel over the data axes."""

    gradients: Literal["none", "bf16", "fp16", "int8", "powersgd"] = "none"
    """none sums in fp32; bf16 and fp16 halve that; int8 (ZeRO++) quarters it; powersgd sends low-rank factors
    between copies. int8 and powersgd keep what they lost and add it the next time."""
    parameters: Literal["none", "int8"] = "none"
    """int8 (ZeRO++) halves what the gathering of bf16 shards sends."""
    rank: Positive = 4
    """Rank of powersgd's factors."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Layout:
    """How the model and the batch are spread over ranks: replicate x shard x context x tensor x pipeline of them."""

    replicate: Positive = 1
    """Ranks that hold whole copies (data parallel)."""
    shard: Positive = 1
    """Ranks over which ZeRO shards its state (data parallel as well)."""
    zero: Literal[0, 1, 2, 3] | None = None
    """What the shard axis divides: 1 optimizer state, 2 also gradients, 3 also parameters (FSDP).
    Default: 0 when shard is 1, else 1."""
    tensor: Positive = 1
    """Ranks over which every matrix is divided (Megatron's tensor parallelism)."""
    sequence_parallel: Flag = True
    """Under tensor parallelism, divide what lies between the matrices (norms, residuals) by tokens."""
    context: Positive = 1
    """Ranks over which the tokens of each sequence are divided."""
    context_kind: Literal["ring", "ulysses"] | None = None
    """ring: keys and values travel; ulysses: heads are exchanged for tokens. Default: chosen, with its reason."""
    expert: Positive = 1
    """Ranks over which a layer's experts are divided; taken out of shard x context."""
    pipeline: Positive = 1
    """Ranks over which the layers are divided."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "interleaved-zero-bubble", "zbv", "dualpipev"] = "1f1b"
    """Order of the pipeline's forward and backward passes."""
    virtual: Positive | None = None
    """Stages of one pipeline rank. Default: 2 for interleaved, interleaved-zero-bubble, zbv and dualpipev, else 1."""
    split: list[Positive] | None = None
    """Layers of each pipeline stage. Default: balanced by cost, embedding and head counted."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, attention, or whole blocks."""
    microbatch: Positive | None = None
    """Sequences of one forward pass on one rank. Default: chosen, and printed with its reason."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """cpu: parameters, gradients and optimizer state stay in the host's memory, where the optimizer then
    runs; disk: as cpu, and AdamW's moments in a file of the run's folder, read and written block by block."""
    compress: Compress = Field(default_factory=Compress)
    bucket: Positive = 1
    """Blocks that are gathered and reduced together: more means fewer and larger messages, and more memory."""
    prefetch: Annotated[int, Field(ge=0, le=64, strict=True)] = 1
    """Buckets that zero 3 gathers ahead of the one that computes, on a GPU while it does."""

    @model_validator(mode="after")
    def _fits(self) -> Layout:
        if self.zero == 0 and self.shard > 1:
            raise ValueError(f"zero: 0 shards nothing, so write replicate: {self.shard} instead of shard")
        if self.pipeline > 1 and self.zero in (2, 3):
            raise ValueError(
                f"zero: {self.zero} would gather or reduce for each of a pipeline's microbatches: use zero: 1"
            )
        if self.pipeline == 1:
            said = [name for name, default in _OF_PIPELINES.items() if getattr(self, name) != default]
            if said:
                raise ValueError(
                    f"{' and '.join(said)} belong to a pipeline: set pipeline to 2 or more, or leave them out"
                )
        if self.bucket > 1 and (
            self.compress.gradients in ("int8", "powersgd") or self.compress.parameters != "none"
        ):
            raise ValueError(f"compress works on one block at a time: use bucket: 1 instead of {self.bucket}")
        if self.context == 1 and self.context_kind is not None:
            raise ValueError(
                "context_kind says how sequences are divided: set context to 2 or more, or leave it out"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ServeLayout:
    """How a model that is served is spread over ranks: tensor x pipeline of them."""

    tensor: Positive = 1
    """Ranks over which every matrix is divided."""
    pipeline: Positive = 1
    """Ranks over which the layers are divided."""
