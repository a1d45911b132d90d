"""The run file as frozen dataclasses: what can be said about a model's life, and nothing twice.

A docstring under a field is its help text, its comment in `muster init` files and its
description in the JSON Schema. Checks that need one section live on that section; checks
that need files, a tokenizer or a machine live where those are known. This module
knows no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from muster.config.checkpoint import Checkpoint as Checkpoint
from muster.config.faults import Faults as Faults
from muster.config.fields import STRICT, Flag, ListOrText, Number, Positive, SectionOrWord
from muster.config.layout import Layout as Layout
from muster.config.layout import ServeLayout as ServeLayout
from muster.config.sync import Sync as Sync
from muster.config.units import Fraction, Interval, Seconds, Tokens

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen3_moe", "dots1"]
SPARSE = ("mixtral", "qwen3_moe", "dots1")
"""Families in which every layer has experts."""
EXPERT_SIZES = ("experts", "experts_per_token", "expert_ffn", "shared_ffn")
"""What is said of experts only."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Model:
    """What is trained: a new model (`family` and sizes, or a `preset`), or an existing one (`from`)."""

    family: Family | None = None
    """Architecture of a new model: llama, mistral, qwen2, qwen3 or gpt2; with experts mixtral, qwen3_moe or dots1."""
    preset: str | None = None
    """A published size by name, e.g. llama-3-8b; sizes written beside it override the preset's."""
    from_: Annotated[str | None, Field(alias="from")] = None
    """Folder whose weights to start from: one in Hugging Face layout, or a run of muster or one of its checkpoints."""
    layers: Positive | None = None
    """Number of transformer blocks."""
    width: Positive | None = None
    """Embedding width E."""
    heads: Positive | None = None
    """Attention heads H; must divide `width`."""
    kv_heads: Positive | None = None
    """Key/value heads K (grouped-query attention); must divide `heads`. Default: `heads`."""
    ffn: Positive | None = None
    """Hidden width F of the feed-forward block. Default: 8/3 x width, rounded up to 64 (gpt2: 4 x width)."""
    experts: Positive | None = None
    """Experts X of a layer (mixtral, qwen3_moe, dots1)."""
    experts_per_token: Positive | None = None
    """Experts that each token is sent to."""
    expert_ffn: Positive | None = None
    """Hidden width of one expert. Default: a dense block's over `experts_per_token`, rounded up to 64."""
    shared_ffn: Positive | None = None
    """Hidden width of the experts that see every token (dots1); a multiple of `expert_ffn`. Default: `expert_ffn`."""
    context: Positive | None = None
    """Longest sequence, in tokens."""
    tied: Flag | None = None
    """Use the embedding matrix as the output head. Default: the family's habit."""
    rope_theta: Annotated[Number, Field(gt=0)] | None = None
    """Base of the rotary position frequencies. Default: the family's."""
    window: Positive | None = None
    """Sliding attention window in tokens (mistral, mixtral). Default: none."""

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        origins = [name for name in ("family", "preset", "from_") if getattr(self, name) is not None]
        if len(origins) != 1:
            said = " and ".join(name.rstrip("_") for name in origins) or "none of them"
            raise ValueError(f"needs exactly one of family, preset or from, but has {said}")
        if self.family is not None:
            needed = ["layers", "width", "heads", "context"]
            needed += ["experts", "experts_per_token"] if self.family in SPARSE else []
            missing = [name for name in needed if getattr(self, name) is None]
            if missing:
                raise ValueError(f"a new {self.family} model also needs {', '.join(missing)}")
        if self.from_ is not None:
            sizes = (
                "layers",
                "width",
                "heads",
                "kv_heads",
                "ffn",
                "tied",
                "rope_theta",
                "window",
                *EXPERT_SIZES,
            )
            said_sizes = [name for name in sizes if getattr(self, name) is not None]
            if said_sizes:
                raise ValueError(f"'from' fixes the sizes, so {', '.join(said_sizes)} cannot be set")
        if self.heads is not None:
            if self.width is not None and self.width % self.heads:
                near = self.heads * max(round(self.width / self.heads), 1)
                raise ValueError(
                    f"heads ({self.heads}) must divide width ({self.width}): nearest legal width is {near}"
                )
            if self.kv_heads is not None and self.heads % self.kv_heads:
                legal = [k for k in range(1, self.heads + 1) if self.heads % k == 0]
                raise ValueError(
                    f"kv_heads ({self.kv_heads}) must divide heads ({self.heads}): legal values are {legal}"
                )
            if self.width is not None and self.family != "gpt2" and (self.width // self.heads) % 2:
                raise ValueError(
                    f"width / heads ({self.width // self.heads}) must be even for rotary positions"
                )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Source:
    """One source of text and its share of the training tokens."""

    files: (
        Annotated[Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")], ListOrText] | None
    ) = None
    """Glob(s) of text, source code, .jsonl or .parquet files, relative to the run file; `stdlib:**/*.py`
    is the running Python's own standard library."""
    hf: str | None = None
    """Name of a data set on the Hugging Face hub (needs the 'hf' extra)."""
    exclude: list[str] = Field(default_factory=list)
    """Globs of files to leave out."""
    text: str = "text"
    """Name of the text field in .jsonl and .parquet records."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """Share of the training tokens, relative to the other sources' weights."""

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if (self.files is None) == (self.hf is None):
            raise ValueError("needs exactly one of files or hf")
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrainTokenizer:
    """A tokenizer trained on the training documents."""

    train: Literal["bpe"]
    """bpe: byte-level byte-pair encoding."""
    vocab: Annotated[int, Field(ge=258, strict=True)]
    """Vocabulary size, special tokens included."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Data:
    """Where the tokens come from."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Sources of the training documents."""
    held_out: Fraction = 0.02
    """Share of the documents (files, or records of .jsonl and .parquet) kept out of training for
    evaluation, chosen by a hash of each document's name."""
    tokenizer: (
        Annotated[Annotated[TrainTokenizer, Tag("<section>")] | Annotated[str, Tag("<word>")], SectionOrWord]
        | None
    ) = None
    """`{train: bpe, vocab: N}`, byte, or the path of a tokenizer.json. Default: that of `model.from`,
    else byte."""
    mask_documents: Flag = True
    """Attention does not cross from one document into the next one packed behind it."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the matrices of the blocks."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw or muon. Under muon the embedding, the head, norms, biases and routers stay with AdamW; its
    updates are scaled to AdamW's size, so a rate and a decay found for one serve the other."""
    lr: Annotated[Number, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and second moment of AdamW."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """Decay of the momentum of muon. Default: 0.95."""
    eps: Annotated[Number, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.1
    """Decoupled weight decay of matrices."""
    clip: Annotated[Number, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null for no clipping."""

    @model_validator(mode="after")
    def _momentum_is_muons(self) -> Optimizer:
        if self.kind != "muon" and self.momentum is not None:
            raise ValueError(
                f"momentum ({self.momentum:g}) is muon's, and {self.kind} has betas instead: remove it, "
                f"or write kind: muon"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Schedule:
    """The learning rate over the run."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine, linear, wsd (warm-up, stable, decay) or constant."""
    warmup: Fraction = 0.02
    """Share of the steps over which the rate rises from 0 to its peak."""
    decay: Fraction = 0.2
    """Share of the steps over which wsd falls at the end."""
    floor: Fraction = 0.1
    """Rate at the end, as a share of the peak."""

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup ({self.warmup:.0%}) and decay ({self.decay:.0%}) together exceed the run"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Balance:
    """How the load of the experts is kept even, in a model that has them."""

    kind: Literal["aux_loss", "bias"] | None = None
    """aux_loss: a loss on the router; bias: a bias on the choice of experts and no loss (dots1).
    Default: bias for dots1, else aux_loss."""
    coefficient: Annotated[Number, Field(ge=0)] | None = None
    """Weight of aux_loss for each token and layer; 0 for none. Default: 0.001."""
    rate: Annotated[Number, Field(gt=0)] | None = None
    """Change of each expert's bias by one step. Default: 0.001."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Train:
    """How long, how large a batch, and with which optimizer."""

    tokens: Tokens
    """Length of the run in tokens; the only place it is stated."""
    batch_tokens: Tokens
    """Tokens of one optimizer step over all ranks; the only place the batch is stated."""
    sequence: Tokens | None = None
    """Tokens of one sample. Default: the model's context."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    balance: Balance = Field(default_factory=Balance)
    sync: Sync | None = None
    """How copies (`layout.replicate`) stay together, `{kind: diloco, every: 20}`. Default: gradients are summed
    every step."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 compute with fp32 master weights and optimizer state; fp32: everything in fp32."""
    eval_every: Interval | None = None
    """Evaluate on the held-out documents this often (`100 steps`, `5m`); always at the end."""
    eval_tokens: Tokens = 131_072
    """Held-out tokens read by one evaluation during training."""
    log_every: Positive = 10
    """Steps between two progress lines."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    """Seeds the initial weights and the order of the data."""

    @model_validator(mode="after")
    def _one_step_at_least(self) -> Train:
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens ({self.tokens}) must be at least batch_tokens ({self.batch_tokens})")
        return self

    @model_validator(mode="after")
    def _copies_meet(self) -> Train:
        steps = self.tokens // self.batch_tokens
        if self.sync is not None and self.sync.is_local and self.sync.every > steps:
            raise ValueError(
                f"sync.every ({self.sync.every}) is more than the {steps} steps of the run, so copies would never "
                f"meet: use {steps} or less"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Parity:
    """How far an export's numbers may be from ours."""

    max_logit_diff: Annotated[Number, Field(gt=0)] = 1e-3
    """Largest absolute logit difference, both sides computed in fp32."""
    top1: Fraction = 0.99
    """Least share of positions whose most likely token agrees."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Export:
    """What `muster export` writes and how it is checked."""

    dtype: Literal["bf16", "fp32"] | None = None
    """Data type of the exported weights. Default: the training precision."""
    parity: Parity = Field(default_factory=Parity)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Serve:
    """How `muster serve` answers."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535, strict=True)] = 8000
    """Port to listen on; 0 takes a free one."""
    streams: Positive = 8
    """Sequences generated at the same time; further requests wait."""
    timeout: Seconds = 300.0
    """Longest time one request may take."""
    layout: ServeLayout = Field(default_factory=ServeLayout)
    """Ranks that the model is divided over: {tensor: 2, pipeline: 2}."""
    follow: Flag = False
    """Take up newer checkpoints of the run while serving, without dropping a request."""
    kv: Literal["int8"] | None = None
    """Format of keys and values in the cache. Default: that of the activations, bf16 or fp32."""
    adapters: dict[str, str] | None = None
    """LoRA adapters in PEFT's layout that requests may name as their model: {NAME: FOLDER}. Default: none."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class Run:
    """A run file: one model's whole life."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run and of its folder."""
    model: Model
    data: Data
    train: Train
    layout: Annotated[
        Annotated[Layout, Tag("<section>")] | Annotated[Literal["auto"], Tag("<word>")], SectionOrWord
    ] = "auto"
    """auto, or the degrees: {shard: 2, tensor: 2, zero: 3, recompute: full, microbatch: 4}."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    faults: Faults = Field(default_factory=Faults)
    export: Export = Field(default_factory=Export)
    serve: Serve = Field(default_factory=Serve)
    track: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Also send metrics there (needs the 'track' extra)."""

    @model_validator(mode="after")
    def _offload_fits(self) -> Run:
        kind = self.train.optimizer.kind
        if not isinstance(self.layout, str) and self.layout.offload == "disk" and kind != "adamw":
            raise ValueError(
                f"layout.offload: disk streams AdamW's two moments, but train.optimizer.kind is {kind}, which "
                f"keeps one: write offload: cpu, or kind: adamw"
            )
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Run:
        if self.checkpoint.keep_best and self.train.eval_every is None:
            raise ValueError(
                "checkpoint.keep_best needs evaluations during training: set train.eval_every, for example to "
                "100 steps, or remove keep_best"
            )
        if self.checkpoint.keep_best and self.data.held_out == 0:
            raise ValueError(
                "checkpoint.keep_best needs held-out documents, but data.held_out is 0: set it, for example to 2%"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> Run:
        if not self.faults.elastic:
            return self
        if isinstance(self.layout, str) or self.layout.replicate == 1:
            raise ValueError(
                "faults.elastic: the groups are the copies of layout.replicate, of which there is no more than one: "
                "write layout: {replicate: 2} or more"
            )
        if self.train.sync is not None and (said := self.train.sync.unfit_for_groups):
            raise ValueError(
                f"faults.elastic: groups that come and go cannot do with train.sync.{said}: remove one of them"
            )
        if self.layout.compress.gradients != "none":
            raise ValueError(
                f"faults.elastic: groups sum their gradients in fp32, so layout.compress.gradients: "
                f"{self.layout.compress.gradients} has no effect between them: remove it"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """The resolved run as plain data, defaults included; `load` reads it back to an equal run."""
        plain: dict[str, Any] = TypeAdapter(Run).dump_python(self, mode="json", by_alias=True)
        return plain
