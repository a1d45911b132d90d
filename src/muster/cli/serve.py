"""`muster serve`: an OpenAI-compatible HTTP server for one model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from muster.errors import MissingExtra, MusterError, UsageError


def serve(
    path: Path | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    streams: int | None = None,
    context: int | None = None,
    dtype: Literal["bf16", "fp32", "int8", "int4"] = "bf16",
    draft: str | None = None,
    replicas: int | None = None,
    upstream: list[str] | None = None,
    policy: Literal["prefix", "tokens", "round-robin"] = "prefix",
    manifest: Literal["kubernetes"] | None = None,
) -> None:
    """Serve a model over HTTP, with the completions and chat API of OpenAI; or route to several servers.

    Stops cleanly on Ctrl-C or SIGTERM.

    Parameters
    ----------
    path
        A run folder (its export is served), or a folder in Hugging Face layout.
    host
        Address to listen on; loopback only, as there is no authentication yet.
    port
        Port to listen on; 0 takes a free one. Default: the run file's, else 8000.
    streams
        Sequences generated at the same time; further requests wait. Default: the run file's, else 8.
    context
        Longest sequence in tokens, prompt and completion together. Default: the model's.
    dtype
        Format of the weights. int8 and int4 are made from the model's at the first start, and kept in its folder.
    draft
        A smaller model with the same tokenizer that guesses ahead, or `ngram` for guesses from the text itself. Used
        while it is measured to be faster; the answers stay the same.
    replicas
        Serve so many processes of the model behind a router, which starts a dead one again and lets another finish its
        answers.
    upstream
        Address of a server that runs already, instead of a model: route to it; several times for several. Any
        OpenAI-compatible kind will do.
    policy
        Which replica gets a request: `prefix`, that which knows its prompt's beginning, unless it is too busy;
        `tokens`, that with the least to do; `round-robin`, each in its turn.
    manifest
        Print the YAML that runs the replicas and the router on Kubernetes, instead of running them here.
    """
    if streams is not None and streams < 1:
        raise UsageError(f"--streams {streams} should be at least 1")
    if context is not None and context < 2:
        raise UsageError(f"--context {context} should be at least 2: a prompt token and a completion token")
    if replicas is not None or upstream or manifest is not None or path is None:
        from muster.cli.route import route

        given = {"--streams": streams, "--context": context, "--dtype": dtype, "--draft": draft}
        options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
        route(
            path,
            replicas=replicas,
            upstream=upstream or (),
            policy=policy,
            host=host,
            port=port,
            options=options,
            manifest=manifest is not None,
        )
        return
    try:
        from muster.serve.engine.process import ProcessEngine
        from muster.serve.http import build_app
        from muster.serve.server import Server, bind, url_of
    except ModuleNotFoundError as error:
        if str(error.name).startswith("muster"):
            raise
        raise MissingExtra("muster serve", "serve") from None
    from muster.observe.format import count
    from muster.serve.folders import find_folder, serve_section
    from muster.serve.limits import Limits

    folder, _ = find_folder(path)
    section = serve_section(folder)
    # The port first: a taken one is known before minutes of loading.
    with bind(host or section.host, section.port if port is None else port) as sock:
        from muster.serve.opening import open_model

        model = open_model(
            folder,
            dtype=dtype,
            streams=streams or section.streams,
            context_tokens=context,
            own_process=True,
            draft=draft,
        )
        limits = Limits(context_tokens=model.context_tokens, request_s=section.timeout)
        app = build_app(model.engine, model.codec, model.model_id, limits)

        def announce() -> None:
            facts = (
                f"{count(model.parameters)} parameters, {model.dtype}, "
                f"context {model.context_tokens}, {model.streams} streams"
            )
            sys.stdout.write(f"threads {model.threads}: {model.threads_reason}\n")
            sys.stdout.write(f"kernels {model.kernels}\n")
            sys.stdout.write(f"serving {model.model_id} on {url_of(sock)}  ({facts})\n")
            sys.stdout.flush()

        server = Server(app, limits, on_ready=announce)
        engine = model.engine
        if isinstance(engine, ProcessEngine):
            engine.on_end = lambda: setattr(server, "should_exit", True)
        try:
            server.serve_on(sock)
        finally:
            engine.close()
        if isinstance(engine, ProcessEngine) and engine.failure is not None:
            raise MusterError(f"{engine.failure}: the server's log has what it said")
