"""From a path to a running engine: read the model's folder, check that it fits, start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import psutil

from muster.errors import ConfigError, DoesNotFit, UsageError
from muster.model.spec import TransformerSpec
from muster.observe.format import count
from muster.serve.crossing import WAITING_S
from muster.serve.folders import Source, find_source, read_spec
from muster.serve.guide import guides_of
from muster.serve.protocol import Engine

if TYPE_CHECKING:
    from muster.serve.adapters import Adapter
    from muster.serve.codec import TextCodec
    from muster.serve.engine.batch import Network, PagedCache
    from muster.serve.engine.core import Core
    from muster.serve.engine.drafters import ModelDrafter
    from muster.serve.engine.process import Worker
    from muster.serve.engine.speculation import Drafter
    from muster.serve.kernels.packing import Format
    from muster.serve.kernels.shape import KV
# torch is imported where a network is made, and tokenizers where text is: the server and its engine each do without
# the other's, which would take most of a start.

NGRAM = "ngram"
"""In place of a draft model: what came after the last few tokens before."""

BLOCK_TOKENS = 16
"""Tokens of a block of the key-value cache: what is shared of prompts is a multiple of it."""

STEP_TOKENS = 256
"""Tokens computed in one step at most: the longest delay of the others' next token, and enough rows for a matrix
product at full speed."""

COMPUTE_BYTES: Mapping[Format, int] = {"fp32": 4, "bf16": 2, "int8": 2, "int4": 2}
"""Of a number that a network computes with, by the format of its weights."""

CACHE_SHARE = 0.5
"""Of the free memory, what the key-value cache takes at most."""

SMALL_PARAMETERS = 32_000_000
"""Below this one thread decodes faster than two: measured 218 against 114 tokens/s for 4 M parameters, and
20 against 23 for 110 M (bf16, one sequence)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A model ready to generate; close `engine` when done."""

    model_id: str
    engine: Engine
    codec: TextCodec
    parameters: int
    dtype: Format
    context_tokens: int
    streams: int
    threads: int
    threads_reason: str
    kernels: str
    """What computes, and why."""
    tensor: int = 1
    pipeline: int = 1
    """Ranks that the model is divided over."""
    adapters: Sequence[Adapter] = ()
    cache: str = ""
    """What the key-value cache holds, in words."""
    draft: str = ""
    """What guesses ahead, in words; empty for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What an engine is made from, as plain data: it may be made in another process."""

    folder: str
    dtype: Format
    streams: int
    context_tokens: int
    vocab: int
    """Tokens of the tokenizer; embeddings beyond are padding."""
    threads: int
    draft: str | None = None
    """`ngram`, or the folder of the model that guesses ahead; None for no guesses."""
    tokenizer: str | None = None
    """Its folder. Default: `folder`."""
    tensor: int = 1
    pipeline: int = 1
    """Ranks that the model is divided over."""
    blocks: int = 0
    """Of the key-value cache; 0 for as many as there is room for when it is made."""
    step: int = 0
    """Training steps behind the weights; 0 where unknown."""
    follow: str | None = None
    """The folder of a run whose newer checkpoints are taken up; None for none."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Folders by name."""
    kv: KV | None = None
    """Format of keys and values in the cache; None for that of the activations."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline


def open_model(
    model: Path | Source,
    *,
    dtype: Format = "bf16",
    streams: int = 1,
    context_tokens: int | None = None,
    own_process: bool = False,
    worker: Worker | None = None,
    draft: str | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    follow: bool = False,
    waiting_s: float = WAITING_S,
    adapters: Mapping[str, str] = MappingProxyType({}),
    kv: KV | None = None,
) -> Opened:
    """Load a model and start its engine: on a thread of this process, or in its own, and there over several ranks.

    `context_tokens` shortens the model's own context. `draft` is `ngram`, or the path of a smaller model with the
    same tokenizer: its guesses at next tokens are used where that is measured to be faster. `worker` is the process of
    the engine, begun earlier. `adapters` are folders by name. `kv` is the format of keys and values. Raises UsageError
    for folders that cannot be served and DoesNotFit when the key-value cache of one sequence exceeds the free memory.
    """
    from muster.serve.codec import TextCodec

    source = find_source(model) if isinstance(model, Path) else model
    spec = read_spec(source.weights)
    _refuse(spec, source, tensor, pipeline, follow, adapters)
    added = _read_adapters(adapters, spec)
    codec = TextCodec.from_folder(source.tokenizer)
    if codec.tokenizer.vocab > spec.vocab:
        raise UsageError(
            f"the tokenizer of {source.tokenizer} has {codec.tokenizer.vocab} tokens, but its model has embeddings for "
            f"{spec.vocab}: they do not belong together"
        )
    threads, reason = choose_threads(spec.parameters(), tensor * pipeline)
    drafts = None if draft is None or draft == NGRAM else _draft_source(Path(draft), codec)
    setup = Setup(
        folder=str(source.weights),
        tokenizer=str(source.tokenizer),
        dtype=dtype,
        streams=streams,
        context_tokens=min(context_tokens or spec.context, spec.context),
        vocab=codec.tokenizer.vocab,
        threads=threads,
        draft=draft if drafts is None else str(drafts.weights),
        tensor=tensor,
        pipeline=pipeline,
        step=source.step,
        follow=str(source.run) if follow else None,
        adapters=dict(adapters),
        kv=kv,
    )
    engine, kernels = _start(setup, own_process, worker, waiting_s)
    return Opened(
        model_id=source.name,
        engine=engine,
        codec=codec,
        parameters=spec.parameters(),
        dtype=dtype,
        context_tokens=setup.context_tokens,
        streams=streams,
        threads=threads,
        threads_reason=reason,
        kernels=kernels,
        tensor=tensor,
        pipeline=pipeline,
        adapters=added,
        cache=_cache_in_words(engine.stats().blocks * BLOCK_TOKENS, spec, setup),
        draft=_draft_in_words(draft, drafts),
    )


def _read_adapters(folders: Mapping[str, str], spec: TransformerSpec) -> Sequence[Adapter]:
    """What is in them, so that all that is wrong is said before anything else is made."""
    if not folders:
        return ()
    from muster.serve.adapters import read_adapters  # and torch with it

    return read_adapters(folders, spec)


def _start(setup: Setup, own_process: bool, worker: Worker | None, waiting_s: float) -> tuple[Engine, str]:
    """The engine, and what computes for it."""
    if not own_process:
        from muster.serve.engine.thread import ThreadEngine
        from muster.serve.kernels.ops import choose_kernels
        from muster.serve.weights import choose_device, compute_dtype

        core = build_core(setup)
        engine = ThreadEngine(core, waiting_s=waiting_s, threads=setup.threads)
        return engine, choose_kernels(compute_dtype(setup.dtype), choose_device(setup.ranks))[1]
    from muster.serve.engine.process import RESTARTS, ProcessEngine  # what it imports is in the extra

    # A rank that has died is the whole engine's end, which says so: whoever keeps servers running starts it again.
    restarts = RESTARTS if setup.ranks == 1 else 0
    made = ProcessEngine(asdict(setup), worker, waiting_s=waiting_s, restarts=restarts)
    return made, made.kernels


def _draft_source(path: Path, codec: TextCodec) -> Source:
    from muster.serve.codec import TextCodec

    source = find_source(path)
    other = TextCodec.from_folder(source.tokenizer).tokenizer
    if other.digest != codec.tokenizer.digest:
        raise UsageError(
            f"the draft model {source.name} has another tokenizer than the model, so that its tokens are not the "
            f"model's: use one that was trained or distilled with the same"
        )
    return source


def _draft_in_words(draft: str | None, source: Source | None) -> str:
    if draft is None:
        return ""
    who = "the text so far"
    if source is not None:
        who = (
            f"{source.name}, {count(read_spec(source.weights).parameters())} parameters, and the text so far"
        )
    return f"{who}: guesses are used where they are measured to be faster"


def _refuse(
    spec: TransformerSpec,
    source: Source,
    tensor: int,
    pipeline: int,
    follow: bool,
    adapters: Mapping[str, str],
) -> None:
    """Before anything is started, whatever cannot be divided, followed or named."""
    from muster.parallel.layout import division_problems

    problems = [f"serve.layout{problem}" for problem in division_problems(spec, tensor, pipeline)]
    if follow and source.run is None:
        problems.append(
            f"serve.follow: {source.weights} is not of a run, so nothing newer can come: give a run folder"
        )
    if source.name in adapters:
        problems.append(f"adapter {source.name}: that is the model's own name: give it another")
    if problems:
        raise ConfigError(problems)


def build_core(setup: Setup) -> Core:
    """Load the weights and make room for keys and values, in this process."""
    from muster.serve.weights import choose_device, load_network

    setup = with_blocks(setup)
    device = choose_device(setup.ranks)
    network = load_network(Path(setup.folder), setup.dtype, device=device, adapters=setup.adapters)
    return core_of(setup, network, network.new_cache(setup.blocks, BLOCK_TOKENS, setup.kv))


def with_blocks(setup: Setup) -> Setup:
    """A setup that says how many blocks the cache has; DoesNotFit where there is no room for it."""
    if setup.blocks:
        return setup
    spec = read_spec(Path(setup.folder))
    # Ranks that share a kv head keep a copy each.
    return replace(
        setup, blocks=count_blocks(replace(spec, kv_heads=max(spec.kv_heads, setup.tensor)), setup)
    )


def core_of(setup: Setup, network: Network, cache: PagedCache) -> Core:
    """The engine around a network that is there."""
    from muster.serve.engine.core import Core
    from muster.serve.engine.drafters import EitherDrafter, NgramDrafter

    drafter: Drafter | None = None
    if setup.draft == NGRAM:
        drafter = NgramDrafter()
    elif setup.draft is not None:
        drafter = EitherDrafter(NgramDrafter(), _model_drafter(Path(setup.draft), setup))
    return Core(
        network,
        cache,
        streams=setup.streams,
        step_tokens=max(STEP_TOKENS, setup.streams),
        context_tokens=setup.context_tokens,
        vocab=setup.vocab,
        guides=guides_of(Path(setup.tokenizer or setup.folder)),
        drafter=drafter,
        salt=salt_of(setup.step),
        weights_step=setup.step,
        adapters=list(setup.adapters),
    )


def salt_of(step: int) -> str:
    """What tells the prefix cache's blocks of one checkpoint from those of another."""
    return f"step {step}"


def _model_drafter(folder: Path, setup: Setup) -> ModelDrafter:
    """A small model that guesses ahead, whole on the first rank."""
    from muster.serve.engine.drafters import ModelDrafter
    from muster.serve.weights import choose_device, load_network

    spec = read_spec(folder)
    if spec.context < setup.context_tokens:
        raise UsageError(
            f"the draft model {folder} has a context of {spec.context} tokens, fewer than the {setup.context_tokens} "
            f"that are served: use --context {spec.context}"
        )
    network = load_network(folder, setup.dtype, device=choose_device(setup.ranks))
    cache = network.new_cache(count_blocks(spec, setup), BLOCK_TOKENS, setup.kv)
    return ModelDrafter(network, cache, vocab=setup.vocab, step_tokens=STEP_TOKENS)


def count_blocks(spec: TransformerSpec, setup: Setup) -> int:
    """Blocks of a model's cache that there is room for now, where it computes."""
    from muster.serve.weights import choose_device, free_memory

    one_bytes = token_bytes(spec, COMPUTE_BYTES[setup.dtype], setup.kv)
    return cache_blocks(
        one_bytes, setup.streams, setup.context_tokens, free_memory(choose_device(setup.ranks))
    )


def token_bytes(spec: TransformerSpec, number_bytes: int, kv: KV | None = None) -> int:
    """What the cache holds of one token: in each layer a key and a value of each kv head."""
    from muster.serve.kernels.shape import row_bytes

    return 2 * spec.layers * spec.kv_heads * row_bytes(spec.head_dim, number_bytes, kv)


def _cache_in_words(tokens: int, spec: TransformerSpec, setup: Setup) -> str:
    number_bytes = COMPUTE_BYTES[setup.dtype]
    each, plain = (token_bytes(spec, number_bytes, kv) for kv in (setup.kv, None))
    words = f"{tokens:,} tokens, {tokens * each / 1e6:,.1f} MB"
    if setup.kv is None:
        return words
    as_activations = "fp32" if number_bytes == 4 else "bf16"
    return f"{words}: in {setup.kv} {plain / each:.2f} times as many as in {as_activations}"


def cache_blocks(token_bytes: int, streams: int, context_tokens: int, free_bytes: int) -> int:
    """Blocks of the key-value cache: every stream's whole context, if half of the free memory holds it.

    With less, streams that grow long take turns. Raises DoesNotFit when not even one sequence fits.
    """
    one = -(-context_tokens // BLOCK_TOKENS)
    affordable = int(CACHE_SHARE * free_bytes) // (token_bytes * BLOCK_TOKENS)
    if affordable < one + 1:
        raise DoesNotFit(
            f"a sequence of {context_tokens} tokens needs a KV cache of {context_tokens * token_bytes / 1e9:.1f} GB, "
            f"but {free_bytes / 1e9:.1f} GB are free, of which it may take {CACHE_SHARE:.0%}: lower --context, or use "
            f"--kv int8"
        )
    return min(streams * one + 1, affordable)


def choose_threads(parameters: int, ranks: int = 1) -> tuple[int, str]:
    """(torch threads of a rank for decoding on this machine, why)."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if ranks > 1:
        return max(cores // ranks, 1), f"{ranks} ranks share {cores} cores"
    if parameters < SMALL_PARAMETERS:
        return 1, "a small model decodes fastest on one core"
    return cores, "one for each core"
