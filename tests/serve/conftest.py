"""A tiny real model with random weights, engines around it, its folder, and a real server on loopback."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from muster.data.tokenizer import Tokenizer
from muster.model.folder import save_folder
from muster.model.spec import TransformerSpec
from muster.model.transformer import Transformer
from muster.serve.codec import TextCodec
from muster.serve.engine.core import Core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.thread import ThreadEngine
from muster.serve.gate import Front
from muster.serve.http import build_app
from muster.serve.kernels.shape import KV
from muster.serve.limits import Limits
from muster.serve.protocol import Engine, Request, Token
from muster.serve.server import Server, bind, url_of
from muster.serve.template import PLAIN, ChatTemplate

CONTEXT = 96

RunningEngine = Callable[..., AbstractContextManager[ThreadEngine]]
Generate = Callable[[Engine, Request], Awaitable[list[Token]]]
Reference = Callable[[Transformer, Sequence[int], int], list[int]]


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """A tiny Llama with random weights, wide enough that different prompts continue differently."""

    def make(vocab: int = 260, spread: float = 8.0, **changes: object) -> Transformer:
        sizes: dict[str, object] = {
            "family": "llama",
            "layers": 2,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "ffn": 64,
            "vocab": vocab,
            "context": CONTEXT,
            "tied": False,
        }
        model = Transformer(TransformerSpec(**(sizes | changes)))  # type: ignore[arg-type]
        model.init_weights(seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(spread)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Transformer]) -> Transformer:
    return make_model()


@pytest.fixture(scope="session")
def folder(make_model: Callable[..., Transformer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder `small-run` with an export of a tiny model and its tokenizer."""
    run = tmp_path_factory.mktemp("runs") / "small-run"
    tokenizer = Tokenizer.byte()
    model = make_model(vocab=tokenizer.vocab)
    save_folder(
        dict(model.named_parameters()),
        model.spec,
        run / "hf",
        dtype=torch.float32,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    tokenizer.save(run / "hf")
    plain = {
        "name": "small-run",
        "model": {"family": "llama", "layers": 2, "width": 32, "heads": 4, "context": CONTEXT},
        "data": {"train": [{"files": "*.txt"}]},
        "train": {"tokens": 1000, "batch_tokens": 100},
        "serve": {"streams": 3, "timeout": "1m"},
    }
    (run / "run.json").write_text(json.dumps({"run": plain, "digest": "0"}))
    return run


def core_of(
    model: Transformer,
    *,
    streams: int = 4,
    step_tokens: int = 64,
    block_tokens: int = 8,
    blocks: int | None = None,
    kv: KV | None = None,
    **options: Any,
) -> Core:
    """A core around a model; room for `streams` whole contexts, if not told otherwise."""
    context = model.spec.context
    room = streams * -(-context // block_tokens) + 1
    network, _ = TransformerNetwork.of(model, "fp32")
    cache = network.new_cache(blocks or min(room, 8000), block_tokens, kv)
    capacity = (cache.keys[0].shape[0] - 1) * block_tokens
    return Core(
        network,
        cache,
        streams=streams,
        step_tokens=step_tokens,
        context_tokens=min(context, capacity),
        **options,
    )


def thread_engine(model: Transformer, *, waiting_limit: int = 256, **options: Any) -> ThreadEngine:
    return ThreadEngine(core_of(model, **options), waiting_limit=waiting_limit, threads=1)


@pytest.fixture(scope="session")
def make_core() -> Callable[..., Core]:
    return core_of


@pytest.fixture
def running() -> RunningEngine:
    """`with running(model, streams=4) as engine`: closed at the end, and then without a thread."""

    @contextlib.contextmanager
    def run(model: Transformer, **options: Any) -> Iterator[ThreadEngine]:
        engine = thread_engine(model, **options)
        try:
            yield engine
        finally:
            engine.close()

    return run


@pytest.fixture
def generate() -> Generate:
    async def collect(engine: Engine, request: Request) -> list[Token]:
        return [token async for token in engine.submit(request)]

    return collect


@pytest.fixture
def reference() -> Reference:
    """The plain greedy loop: a whole forward pass for every token, no cache, no batch."""

    def greedy(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]

    return greedy


@dataclass(frozen=True)
class Served:
    """A running server and what stands behind it."""

    url: str
    engine: ThreadEngine
    codec: TextCodec
    server: Server

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.partition("://")[2].split(":")
        return host, int(port)


Serving = Callable[..., AbstractContextManager[Served]]


@contextlib.contextmanager
def _serving(
    model: Transformer,
    *,
    streams: int = 4,
    waiting_limit: int = 256,
    template: ChatTemplate = PLAIN,
    front: Front | None = None,
    tls: ssl.SSLContext | None = None,
    warm_up: Callable[[], Awaitable[None]] | None = None,
    wait: bool = True,
    adapters: Sequence[str] = (),
    **limits: float,
) -> Iterator[Served]:
    tokenizer = Tokenizer.byte()
    codec = TextCodec(tokenizer=tokenizer, eos_ids=frozenset({tokenizer.eos_id}), template=template)
    engine = thread_engine(
        model,
        streams=streams,
        waiting_limit=waiting_limit,
        vocab=tokenizer.vocab,
        guides=codec.guides,
        adapters=adapters,
    )
    bounds = Limits(context_tokens=model.spec.context, **limits)  # type: ignore[arg-type]
    sock = bind("127.0.0.1", 0)
    url = url_of(sock, secure=tls is not None)
    ready = threading.Event()
    front = front or Front()
    app = build_app(engine, codec, "tiny", bounds, front, adapters)
    server = Server(app, bounds, on_ready=ready.set, front=front, tls=tls, warm_up=warm_up)
    thread = threading.Thread(target=server.serve_on, args=(sock,))
    thread.start()
    try:
        assert not wait or ready.wait(30)
        yield Served(url, engine, codec, server)
    finally:
        server.should_exit = True
        thread.join(30)
        engine.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving() -> Serving:
    """`with serving(model, streams=..., <limits>) as served`: a real server in a thread."""
    return _serving


@pytest.fixture(scope="session")
def served(model: Transformer) -> Iterator[Served]:
    """One server for all tests that need nothing special of it."""
    with _serving(model) as running_server:
        yield running_server


@pytest.fixture
def connect() -> Iterator[Callable[[Served], openai.OpenAI]]:
    """The official client, without retries, closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda served: stack.enter_context(
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        )


@pytest.fixture
def client(served: Served, connect: Callable[[Served], openai.OpenAI]) -> openai.OpenAI:
    return connect(served)
