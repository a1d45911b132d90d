"""`muster serve --replicas` and `--upstream`: one address for many servers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from muster.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from muster.serve.router.policy import Policy


def route(
    path: Path | None,
    *,
    replicas: int | None,
    prefill_replicas: int,
    upstream: Sequence[str],
    policy: Policy,
    hedge_after: str | None,
    host: str | None,
    port: int | None,
    options: Sequence[str],
    manifest: bool,
    keys: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    requests_per_minute: int | None,
    access_log: Path | None,
) -> None:
    """Run a router over `replicas` of the model at `path`, each started with `options`, or over servers elsewhere; or
    print a `manifest` of the former."""
    try:
        from muster.serve.gate import Front
        from muster.serve.keys import read_keys
        from muster.serve.rates import Rates
        from muster.serve.router.hedge import Hedging
        from muster.serve.router.manifest import kubernetes
        from muster.serve.router.run import Local, Router
        from muster.serve.server import bind
    except ModuleNotFoundError as error:
        if str(error.name).startswith("muster"):
            raise
        raise MissingExtra("muster serve", "serve") from None
    from muster.serve.folders import find_source, serve_section
    from muster.serve.tls import tls_context
    from muster.serve.visit import open_log

    if upstream and (path is not None or replicas is not None):
        raise UsageError("--upstream names servers that run already: leave PATH and --replicas out")
    if replicas is not None and replicas < 1:
        raise UsageError(f"--replicas {replicas} should be at least 1")
    if prefill_replicas < 0 or (prefill_replicas and path is None):
        raise UsageError(
            f"--prefill-replicas {prefill_replicas} should be replicas of a model: give its PATH"
        )
    if not upstream and path is None:
        raise UsageError("nothing to serve: give a model's PATH, or servers with --upstream URL")
    hedging = Hedging(hedge_after)
    section, name = None, ""
    if path is not None:
        source = find_source(path)
        section, name = serve_section(source.run or source.weights), source.name
    divided = any(flag in options for flag in ("--tensor", "--pipeline"))
    divided = divided or (section is not None and section.layout.tensor * section.layout.pipeline > 1)
    if prefill_replicas and divided:
        raise UsageError(
            "--prefill-replicas moves blocks between whole models: leave tensor and pipeline at 1"
        )
    address = host or (section.host if section else "127.0.0.1")
    number = port if port is not None else (section.port if section else 8000)
    if manifest:
        if path is None:
            raise UsageError("--manifest describes replicas of a model: give its PATH")
        sys.stdout.write(kubernetes(name, replicas=replicas or 1, port=number or 8000, options=options))
        return
    behind: Local | Sequence[str] = upstream
    if path is not None:
        arguments = [str(path), "--host", "127.0.0.1", "--port", "0", *options]
        behind = Local(replicas=replicas or 1, arguments=arguments, for_prompts=prefill_replicas)
    tls = tls_context(tls_cert, tls_key)
    front = Front(keys=read_keys(keys, os.environ), rates=Rates(requests_per_minute=requests_per_minute))
    guarded = bool(front.keys)
    with open_log(access_log) as front.log, bind(address, number, guarded=guarded) as sock:
        Router(sock, behind, policy, front, tls, hedging).run()
