"""From a path to a running engine: read the model's folder, check that it fits, start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from muster.errors import DoesNotFit, UsageError
from muster.model.folder import read_spec
from muster.model.spec import TransformerSpec
from muster.serve.codec import TextCodec
from muster.serve.crossing import WAITING_S
from muster.serve.engine.batch import Network, PagedCache
from muster.serve.engine.core import Core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.packed_file import open_packed
from muster.serve.engine.speculation import Drafter, ModelDrafter, NgramDrafter
from muster.serve.engine.thread import ThreadEngine
from muster.serve.folders import find_folder
from muster.serve.kernels.ops import choose_kernels
from muster.serve.kernels.packing import Format
from muster.serve.protocol import Engine

NGRAM = "ngram"
"""In place of a draft model: what came after the last few tokens before."""

BLOCK_TOKENS = 16
"""Tokens of a block of the key-value cache: what is shared of prompts is a multiple of it."""

STEP_TOKENS = 256
"""Tokens computed in one step at most: the longest delay of the others' next token, and enough rows for a matrix
product at full speed."""

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


def open_model(
    path: Path,
    *,
    dtype: Format = "bf16",
    streams: int = 1,
    context_tokens: int | None = None,
    own_process: bool = False,
    draft: str | None = None,
    waiting_s: float = WAITING_S,
) -> Opened:
    """Load a model and start its engine: on a thread of this process, or in its own.

    `context_tokens` shortens the model's own context. `draft` is `ngram`, or the path of a smaller model with the
    same tokenizer: its guesses at next tokens are used where that is measured to be faster. Raises UsageError for a
    folder that cannot be served and DoesNotFit when the key-value cache of one sequence exceeds the free memory.
    """
    folder, name = find_folder(path)
    spec = read_spec(folder)
    codec = TextCodec.from_folder(folder)
    if codec.tokenizer.vocab > spec.vocab:
        raise UsageError(
            f"the tokenizer of {folder} has {codec.tokenizer.vocab} tokens, but its model has embeddings for "
            f"{spec.vocab}: they do not belong together"
        )
    threads, reason = choose_threads(spec.parameters())
    setup = Setup(
        folder=str(folder),
        dtype=dtype,
        streams=streams,
        context_tokens=min(context_tokens or spec.context, spec.context),
        vocab=codec.tokenizer.vocab,
        threads=threads,
        draft=draft if draft is None or draft == NGRAM else str(_draft_folder(Path(draft), codec)),
    )
    return Opened(
        model_id=name,
        engine=_start(setup, own_process, waiting_s),
        codec=codec,
        parameters=spec.parameters(),
        dtype=dtype,
        context_tokens=setup.context_tokens,
        streams=streams,
        threads=threads,
        threads_reason=reason,
        kernels=choose_kernels(compute_dtype(dtype))[1],
    )


def _start(setup: Setup, own_process: bool, waiting_s: float) -> Engine:
    if not own_process:
        return ThreadEngine(build_core(setup), waiting_s=waiting_s, threads=setup.threads)
    from muster.serve.engine.process import ProcessEngine  # what it imports is in the extra

    return ProcessEngine(asdict(setup), waiting_s=waiting_s)


def _draft_folder(path: Path, codec: TextCodec) -> Path:
    folder, name = find_folder(path)
    other = TextCodec.from_folder(folder).tokenizer
    if other.digest != codec.tokenizer.digest:
        raise UsageError(
            f"the draft model {name} has another tokenizer than the model, so that its tokens are not the model's: "
            f"use one that was trained or distilled with the same"
        )
    return folder


def build_core(setup: Setup) -> Core:
    """Load the weights and make room for keys and values."""
    free_bytes = psutil.virtual_memory().available
    network, cache = _network(Path(setup.folder), setup, free_bytes)
    drafter: Drafter | None = None
    if setup.draft == NGRAM:
        drafter = NgramDrafter()
    elif setup.draft is not None:
        drafter = ModelDrafter(
            *_network(Path(setup.draft), setup, free_bytes), vocab=setup.vocab, step_tokens=STEP_TOKENS
        )
    return Core(
        network,
        cache,
        streams=setup.streams,
        step_tokens=max(STEP_TOKENS, setup.streams),
        context_tokens=setup.context_tokens,
        vocab=setup.vocab,
        guides=TextCodec.from_folder(Path(setup.folder)).guides,
        drafter=drafter,
    )


def _network(folder: Path, setup: Setup, free_bytes: int) -> tuple[Network, PagedCache]:
    """The one place that decides what computes: a folder's weights, and the cache beside them."""
    spec, dtype = read_spec(folder), compute_dtype(setup.dtype)
    if spec.context < setup.context_tokens:
        raise UsageError(
            f"the draft model {folder} has a context of {spec.context} tokens, fewer than the {setup.context_tokens} "
            f"that are served: use --context {spec.context}"
        )
    blocks = cache_blocks(spec, dtype, setup.streams, setup.context_tokens, free_bytes)
    packed, _ = open_packed(folder, setup.dtype)
    network = TransformerNetwork(packed, choose_kernels(packed.compute)[0])
    return network, network.new_cache(blocks, BLOCK_TOKENS)


def compute_dtype(format: Format) -> torch.dtype:
    """What activations and the cache are, for weights in a format."""
    return torch.float32 if format == "fp32" else torch.bfloat16


def cache_blocks(
    spec: TransformerSpec, dtype: torch.dtype, streams: int, context_tokens: int, free_bytes: int
) -> int:
    """Blocks of the key-value cache: every stream's whole context, if half of the free memory holds it.

    With less, streams that grow long take turns. Raises DoesNotFit when not even one sequence fits.
    """
    token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize
    one = -(-context_tokens // BLOCK_TOKENS)
    affordable = int(CACHE_SHARE * free_bytes) // (token_bytes * BLOCK_TOKENS)
    if affordable < one + 1:
        raise DoesNotFit(
            f"a sequence of {context_tokens} tokens needs a KV cache of {context_tokens * token_bytes / 1e9:.1f} GB, "
            f"but {free_bytes / 1e9:.1f} GB are free, of which it may take {CACHE_SHARE:.0%}: lower --context"
        )
    return min(streams * one + 1, affordable)


def choose_threads(parameters: int) -> tuple[int, str]:
    """(torch threads for decoding on this machine, why)."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if parameters < SMALL_PARAMETERS:
        return 1, "a small model decodes fastest on one core"
    return cores, "one for each core"
