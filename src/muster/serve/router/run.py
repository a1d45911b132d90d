"""A router from its beginning to its end: the socket, the probes, and where they are ours the replicas."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from muster.errors import UsageError
from muster.serve.gate import Front
from muster.serve.handover import VARIABLE
from muster.serve.limits import Limits
from muster.serve.router.app import build_app
from muster.serve.router.fleet import Fleet, Replica
from muster.serve.router.handover import Carrier
from muster.serve.router.hedge import Hedging
from muster.serve.router.policy import Policy
from muster.serve.router.probe import watch
from muster.serve.router.supervise import Supervisor
from muster.serve.router.upstream import Upstream
from muster.serve.server import Server, url_of

BODY_BYTES = 32 << 20
"""Size of a request's body: servers of other kinds may take images; each has its own limit besides."""
REASONS: dict[Policy, str] = {
    "prefix": "the replica that knows a prompt's beginning, unless it is too busy; else the one with the least to do",
    "tokens": "the replica with the fewest tokens to generate, in proportion to its measured speed",
    "round-robin": "each replica in its turn",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """Replicas of our own: `muster serve ARGUMENTS`, so many times."""

    replicas: int
    arguments: Sequence[str]
    for_prompts: int = 0
    """Replicas besides, which compute long prompts for the others."""


class Router:
    """Routes to replicas that it starts, or to the servers at some addresses. Raises UsageError for wrong ones."""

    def __init__(
        self,
        sock: socket.socket,
        behind: Local | Sequence[str],
        policy: Policy,
        front: Front | None = None,
        tls: ssl.SSLContext | None = None,
        hedging: Hedging | None = None,
    ) -> None:
        self._sock, self._behind = sock, behind
        self._url = url_of(sock, secure=tls is not None)
        front = front or Front()
        self._carrier: Carrier | None = None
        if isinstance(behind, Local):
            self._carrier = Carrier() if behind.for_prompts else None
            replicas = [
                Replica(index, str(index), for_prompts=index >= behind.replicas)
                for index in range(behind.replicas + behind.for_prompts)
            ]
        else:
            upstreams = [Upstream(url) for url in behind]
            urls = [upstream.url for upstream in upstreams]
            if twice := {url for url in urls if urls.count(url) > 1}:
                raise UsageError(f"--upstream {min(twice)} is given twice: give each server once")
            replicas = [Replica(index, one.url, upstream=one) for index, one in enumerate(upstreams)]
        self.fleet = Fleet(replicas, policy, hedging, self._carrier)
        limits = Limits(context_tokens=0, body_bytes=BODY_BYTES)
        app = build_app(self.fleet, front, body_bytes=BODY_BYTES)
        self._server = _Server(app, limits, on_ready=self._on_ready, front=front, tls=tls)
        self._server.on_end = self._on_end
        self._tasks: list[asyncio.Task[None]] = []
        self._supervisor: Supervisor | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT: then requests under way are finished, and our replicas ended. Raises
        MusterError when the first of these does not come up."""
        try:
            self._server.serve_on(self._sock)
        finally:
            if self._supervisor is not None:
                self._supervisor.close()
            if self._carrier is not None:
                self._carrier.close()
        if self._supervisor is not None and self._supervisor.failure is not None:
            raise self._supervisor.failure

    def stop(self) -> None:
        """As SIGTERM does, from any thread."""
        self._server.should_exit = True

    def _on_ready(self) -> None:
        """The socket listens, and the event loop runs."""
        loop = asyncio.get_running_loop()
        if isinstance(self._behind, Local):

            def told(index: int, url: str | None) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: we are ending
                    loop.call_soon_threadsafe(self._told, index, url)

            self._supervisor = Supervisor(
                len(self.fleet.replicas),
                self._behind.arguments,
                environment={} if self._carrier is None else {VARIABLE: self._carrier.handover.told},
                told=told,
                say=_say,
                on_failure=self.stop,
            )
            self._supervisor.start()
        for replica in self.fleet.replicas:
            on_dead = partial(self._on_dead, replica)
            self._tasks.append(loop.create_task(watch(self.fleet, replica, on_dead)))
        self._tasks.append(loop.create_task(self._announce()))

    async def _on_end(self) -> None:
        """No request is left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self.fleet.replicas:
            if replica.upstream is not None:
                replica.upstream.abort()
        await asyncio.sleep(0)  # in which connections are closed

    def _told(self, index: int, url: str | None) -> None:
        replica = self.fleet.replicas[index]
        if url is not None:
            replica.came(Upstream(url))
            return
        if replica.upstream is not None:  # it has listened
            self.fleet.lost(replica)
            replica.upstream = None

    def _on_dead(self, replica: Replica) -> None:
        _say(f"replica {replica.name} has stopped answering")
        if self._supervisor is not None:
            self._supervisor.kill(replica.index)

    async def _announce(self) -> None:
        while not self.fleet.ready:
            await self.fleet.wait()
        _say(f"policy {self.fleet.policy}: {REASONS[self.fleet.policy]}")
        _say(f"serving {len(self.fleet.replicas)} replicas on {self._url}")


class _Server(Server):
    on_end: Callable[[], Awaitable[None]]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self.on_end()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
