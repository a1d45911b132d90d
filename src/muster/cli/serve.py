"""`muster serve`: an OpenAI-compatible HTTP server for one model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from muster.errors import UsageError


def serve(
    path: Path | None = None,
    *,
    host: str | None = None,
    port: int | None = None,
    streams: int | None = None,
    context: int | None = None,
    dtype: Literal["bf16", "fp32", "int8", "int4"] = "bf16",
    kv: Literal["int8"] | None = None,
    draft: str | None = None,
    tensor: int | None = None,
    pipeline: int | None = None,
    follow: bool = False,
    adapter: list[str] | None = None,
    replicas: int | None = None,
    prefill_replicas: int = 0,
    upstream: list[str] | None = None,
    policy: Literal["prefix", "tokens", "round-robin"] = "prefix",
    hedge_after: str | None = None,
    manifest: Literal["kubernetes"] | None = None,
    max_wait: float = 60.0,
    keys: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    access_log: Path | None = None,
) -> None:
    """Serve a model over HTTP, with the completions and chat API of OpenAI; or route to several servers.

    Stops cleanly on Ctrl-C or SIGTERM: new requests are refused, and those under way are finished first.

    Parameters
    ----------
    path
        A run folder (its newest sound checkpoint is served, or its export where that is as new), a checkpoint, or a
        folder in Hugging Face layout.
    host
        Address to listen on. Keys are needed where other machines can reach it. Default: the run file's, else
        127.0.0.1.
    port
        Port to listen on; 0 takes a free one. Default: the run file's, else 8000.
    streams
        Sequences generated at the same time; further requests wait. Default: the run file's, else 8.
    context
        Longest sequence in tokens, prompt and completion together. Default: the model's.
    dtype
        Format of the weights. int8 and int4 are made from the model's at the first start, and kept in its folder.
    kv
        Format of keys and values in the cache: int8 holds almost twice as many tokens in the same memory. Default: the
        run file's serve.kv, else bf16 (fp32 with --dtype fp32).
    draft
        A smaller model with the same tokenizer that guesses ahead, and the text itself where that has been right more
        often; or `ngram` for the text alone. Used while it is measured to be faster; the answers stay the same.
    tensor
        Ranks over which every matrix is divided. Default: the run file's serve.layout, else 1.
    pipeline
        Ranks over which the layers are divided. Default: the run file's serve.layout, else 1.
    follow
        Take up newer checkpoints of the run while serving, without dropping a request.
    adapter
        NAME=FOLDER of a LoRA adapter in PEFT's layout; several times for several. A request that names it as its model
        is answered by the model with it. Default: the run file's serve.adapters.
    replicas
        Serve so many processes of the model behind a router, which starts a dead one again and lets another finish its
        answers.
    prefill_replicas
        Further replicas that compute long prompts for the others, so that streams do not wait for them. No gain has
        been measured yet.
    upstream
        Address of a server that runs already, instead of a model: route to it; several times for several. Any
        OpenAI-compatible kind will do.
    policy
        Which replica gets a request: `prefix`, that which knows its prompt's beginning, unless it is too busy;
        `tokens`, that with the least to do; `round-robin`, each in its turn.
    hedge_after
        Ask a second replica for a stream that has not begun after so long, as 500ms, or p95 for what 95 of 100 streams
        begin within; the first token wins. Default: never.
    manifest
        Print the YAML that runs the replicas and the router on Kubernetes, instead of running them here.
    max_wait
        Seconds that a request may have to wait before it is begun; one that would be likely to wait longer is refused
        at once, and told when to come again.
    keys
        File of API keys, one `key` or `name: key` a line; more in the environment variable MUSTER_KEYS. `trusted` after
        a key lets its requests have a priority below 0, and name their users.
    tls_cert
        Certificate chain in PEM format: serve HTTPS.
    tls_key
        Its private key, unless that is in the same file.
    requests_per_minute
        Requests that each key may send in a minute. Default: any number.
    tokens_per_minute
        Tokens that each key may use in a minute, of prompts and answers. Default: any number.
    access_log
        File to append a JSON line to for each request; `-` is standard output. Default: none.
    """
    if (told := os.environ.get("MUSTER_SERVE_RANK")) is not None:  # one of the ranks of an engine
        from muster.resilience.lifeline import reported

        with reported():
            from muster.serve.making import run_rank

            run_rank(told)
        return
    sizes = {
        "--streams": streams,
        "--tensor": tensor,
        "--pipeline": pipeline,
        "--requests-per-minute": requests_per_minute,
        "--tokens-per-minute": tokens_per_minute,
    }
    for flag, size in sizes.items():
        if size is not None and size < 1:
            raise UsageError(f"{flag} {size} should be at least 1")
    if context is not None and context < 2:
        raise UsageError(f"--context {context} should be at least 2: a prompt token and a completion token")
    if not max_wait > 0:
        raise UsageError(f"--max-wait {max_wait:g} should be more than 0 seconds")
    adapters = _named(adapter or ())
    if replicas is not None or prefill_replicas or upstream or manifest is not None or path is None:
        if tokens_per_minute is not None:
            raise UsageError(
                "--tokens-per-minute is not counted by a router: give it to the servers behind it"
            )
        from muster.cli.route import route

        given = {
            "--streams": streams,
            "--context": context,
            "--dtype": dtype,
            "--kv": kv,
            "--draft": draft,
            "--tensor": tensor,
            "--pipeline": pipeline,
            "--max-wait": max_wait,
            "--keys": keys,
        }
        options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
        options += ["--follow"] if follow else []
        options += [text for one in adapter or () for text in ("--adapter", one)]
        route(
            path,
            replicas=replicas,
            prefill_replicas=prefill_replicas,
            upstream=upstream or (),
            policy=policy,
            hedge_after=hedge_after,
            host=host,
            port=port,
            options=options,
            manifest=manifest is not None,
            keys=keys,
            tls_cert=tls_cert,
            tls_key=tls_key,
            requests_per_minute=requests_per_minute,
            access_log=access_log,
        )
        return
    from muster.cli._server import Options, run_server

    run_server(
        Options(
            path=path,
            host=host,
            port=port,
            streams=streams,
            context=context,
            dtype=dtype,
            kv=kv,
            draft=draft,
            tensor=tensor,
            pipeline=pipeline,
            follow=follow,
            adapters=adapters,
            max_wait=max_wait,
            keys=keys,
            tls_cert=tls_cert,
            tls_key=tls_key,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            access_log=access_log,
        )
    )


def _named(adapters: Sequence[str]) -> dict[str, str]:
    """Folders by name; UsageError for what is not NAME=FOLDER, and for a name that comes twice."""
    found: dict[str, str] = {}
    for one in adapters:
        name, equals, folder = one.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--adapter {one} should be NAME=FOLDER")
        if name in found:
            raise UsageError(f"--adapter {name} is given twice: each needs a name of its own")
        found[name] = folder
    return found
