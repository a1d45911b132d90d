"""The router as an ASGI app: its own health and figures, and everything else passed on."""

from __future__ import annotations

import contextlib
import logging

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from muster.serve import playground
from muster.serve.body import BodyGuard
from muster.serve.connection import while_connected
from muster.serve.failures import error_response
from muster.serve.gate import Front, Gate
from muster.serve.router import catalogue
from muster.serve.router.asked import read
from muster.serve.router.fleet import Fleet
from muster.serve.router.forward import Incoming, forward, named, sent_on
from muster.serve.router.upstream import Headers
from muster.serve.visit import Visit

_LOG = logging.getLogger(__name__)


def build_app(fleet: Fleet, front: Front, *, body_bytes: int) -> ASGIApp:
    """An ASGI app in front of a fleet."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        own = _own(scope["path"], fleet, front) if scope["method"] == "GET" else None
        if own is not None:
            await own(scope, receive, send)
            return
        with contextlib.suppress(ClientDisconnect):
            await _pass_on(scope, receive, send, fleet)

    return Gate(BodyGuard(app, body_bytes), front)


def _own(path: str, fleet: Fleet, front: Front) -> Response | None:
    """What the router answers itself."""
    if path == playground.PATH:
        return playground.playground()
    if path == "/health":
        replicas = [
            {
                "name": one.name,
                "url": None if one.upstream is None else one.upstream.url,
                "ready": one.ready,
                "open": one.breaker.is_open,
            }
            for one in fleet.replicas
        ]
        relays = all(one.relays for one in fleet.replicas)
        return JSONResponse({"status": "ok", "relay": relays, "replicas": replicas})
    if path == "/health/ready":
        phase = front.phase if fleet.ready or front.phase == "draining" else "starting"
        return JSONResponse({"status": phase}, 200 if phase == "ready" else 503)
    if path == "/metrics":
        return PlainTextResponse(figures(fleet), media_type="text/plain; version=0.0.4")
    return None


async def _pass_on(scope: Scope, receive: Receive, send: Send, fleet: Fleet) -> None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    begun = False
    request_id = Visit.of(scope).id.encode()

    async def begin(status: int, headers: Headers) -> None:
        nonlocal begun
        begun = True
        await send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})

    query = scope["query_string"].decode("latin-1")
    target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
    incoming = Incoming(
        method=scope["method"],
        target=target,
        headers=named(sent_on(scope["headers"]), request_id),
        asked=read(scope["path"], bytes(body)),
        begin=begin,
        write=write,
    )

    async def answer() -> None:
        listed = None
        if (incoming.method, incoming.target) == ("GET", catalogue.PATH):
            listed = await catalogue.catalogue(fleet, incoming.headers)
        if listed is None:
            await forward(incoming, fleet)
            return
        length = str(len(listed)).encode()
        await begin(200, [(b"content-type", b"application/json"), (b"content-length", length)])
        await write(listed)

    try:
        await while_connected(receive, answer())
    except ClientDisconnect:
        raise
    except Exception as error:  # a fault of ours: the client gets an answer, or a cut connection
        _LOG.error("a request could not be passed on", exc_info=error)
        if begun:
            raise
        await error_response(500, "internal error; the router's log has the details")(scope, receive, send)
        return
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def figures(fleet: Fleet) -> str:
    """The router's figures in Prometheus' text format."""
    figures_by_name: dict[str, tuple[str, list[float]]] = {
        "replica_ready": ("gauge", [float(one.ready) for one in fleet.replicas]),
        "replica_breaker_open": ("gauge", [float(one.breaker.is_open) for one in fleet.replicas]),
        "replica_running_requests": ("gauge", [one.meter.running for one in fleet.replicas]),
        "replica_outstanding_tokens": ("gauge", [one.load for one in fleet.replicas]),
        "replica_tokens_per_second": ("gauge", [one.meter.rate or 0.0 for one in fleet.replicas]),
        "replica_requests_total": ("counter", [one.requests for one in fleet.replicas]),
        "replica_broken_requests_total": ("counter", [one.deaths for one in fleet.replicas]),
    }
    lines = []
    for name, (kind, values) in figures_by_name.items():
        lines.append(f"# TYPE muster_router_{name} {kind}")
        for replica, value in zip(fleet.replicas, values, strict=True):
            lines.append(f'muster_router_{name}{{replica="{replica.name}"}} {value:g}')
    totals = {
        "failovers_total": fleet.failovers,
        "retries_total": fleet.retries,
        "hedges_total": fleet.hedging.hedges,
        "hedge_wins_total": fleet.hedging.wins,
    }
    if fleet.carrier is not None:
        totals |= {"handovers_total": fleet.carrier.carried, "failed_handovers_total": fleet.carrier.failed}
    for name, count in totals.items():
        lines += [f"# TYPE muster_router_{name} counter", f"muster_router_{name} {count}"]
    return "\n".join(lines) + "\n"
