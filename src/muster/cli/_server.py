"""One server of one model, from what the command line says to its end."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from muster.errors import MissingExtra, MusterError

if TYPE_CHECKING:
    from muster.serve.engine.process import Worker
    from muster.serve.kernels.packing import Format
    from muster.serve.kernels.shape import KV
    from muster.serve.opening import Opened


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Of `muster serve`; None is the run file's setting."""

    path: Path
    host: str | None
    port: int | None
    streams: int | None
    context: int | None
    dtype: Format
    kv: KV | None
    draft: str | None
    tensor: int | None
    pipeline: int | None
    follow: bool
    adapters: Mapping[str, str]
    max_wait: float
    keys: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    access_log: Path | None


def run_server(options: Options) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        from muster.serve.stoppable import stoppable_worker
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    # What the engine's process imports takes longest, and goes on beside all that follows.
    with stoppable_worker() as worker:
        _serve(options, worker)


def _serve(options: Options, worker: Worker) -> None:
    from muster.serve.folders import find_source, serve_section

    source = find_source(options.path, on_damaged=_complain)
    worker.read_ahead(source.weights, options.dtype)
    try:
        from muster.serve.engine.process import ProcessEngine
        from muster.serve.gate import Front
        from muster.serve.handover import Handover
        from muster.serve.http import build_app
        from muster.serve.keys import read_keys
        from muster.serve.rates import Rates
        from muster.serve.server import Server, bind, url_of
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    from muster.serve.limits import Limits
    from muster.serve.tls import tls_context
    from muster.serve.visit import open_log
    from muster.serve.warmup import warm_up

    section = serve_section(source.run or source.weights)
    tls = tls_context(options.tls_cert, options.tls_key)
    rates = Rates(
        requests_per_minute=options.requests_per_minute, tokens_per_minute=options.tokens_per_minute
    )
    front = Front(keys=read_keys(options.keys, os.environ), rates=rates, handover=Handover.given(os.environ))
    address, number = options.host or section.host, section.port if options.port is None else options.port
    # The port first: a taken one is known before minutes of loading.
    with (
        open_log(options.access_log) as front.log,
        bind(address, number, guarded=bool(front.keys)) as sock,
    ):
        from muster.serve.opening import open_model

        model = open_model(
            source,
            dtype=options.dtype,
            streams=options.streams or section.streams,
            context_tokens=options.context,
            own_process=True,
            worker=worker,
            kv=options.kv or section.kv,
            draft=options.draft,
            tensor=options.tensor or section.layout.tensor,
            pipeline=options.pipeline or section.layout.pipeline,
            follow=options.follow or section.follow,
            waiting_s=options.max_wait,
            adapters={**(section.adapters or {}), **options.adapters},
        )
        engine = model.engine
        assert isinstance(engine, ProcessEngine)
        limits = Limits(context_tokens=model.context_tokens, request_s=section.timeout)
        names = [one.name for one in model.adapters]
        app = build_app(engine, model.codec, model.model_id, limits, front, names)
        url = url_of(sock, secure=tls is not None)

        def on_ready() -> None:
            # What is there now stays: looking through it now and then would delay what goes out. Without it there seems
            # to be little else, and all of that would be looked through five times as often as it has to be.
            gc.freeze()
            gc.set_threshold(*gc.get_threshold()[:2], 50)
            _announce(model, url)

        server = Server(
            app,
            limits,
            on_ready=on_ready,
            front=front,
            tls=tls,
            warm_up=lambda: warm_up(engine),
        )
        engine.on_end = lambda: setattr(server, "should_exit", True)
        try:
            server.serve_on(sock)
        finally:
            engine.close()
        if engine.failure is not None:
            raise MusterError(f"{engine.failure}: the server's log has what it said")


def _announce(model: Opened, url: str) -> None:
    """What serves, and how, on standard output: the last line says where."""
    from muster.observe.format import count

    lines = []
    if (ranks := model.tensor * model.pipeline) > 1:
        lines.append(f"layout  tensor {model.tensor} x pipeline {model.pipeline}: {ranks} ranks")
    lines.append(f"cache   {model.cache}")
    if model.draft:
        lines.append(f"draft   {model.draft}")
    for one in model.adapters:
        lines.append(f"adapter {one.name}: rank {one.rank}, {count(one.parameters)} parameters")
    lines.append(f"threads {model.threads}: {model.threads_reason}")
    lines.append(f"kernels {model.kernels}")
    facts = (
        f"{count(model.parameters)} parameters, {model.dtype}, "
        f"context {model.context_tokens}, {model.streams} streams"
    )
    lines.append(f"serving {model.model_id} on {url}  ({facts})")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _missing(error: ModuleNotFoundError) -> Exception:
    return error if str(error.name).startswith("muster") else MissingExtra("muster serve", "serve")


def _complain(sentence: str) -> None:
    sys.stderr.write(f"muster: {sentence}\n")
