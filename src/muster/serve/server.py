"""The socket: uvicorn with h11, TLS, receipt deadlines, byte limits, a warm-up, and an end that always comes.

Told to stop, it still answers: what runs is finished, what is new is refused, and `/health/ready` says so. h11 is
forced because httptools, which uvicorn prefers where it is installed, accepts headers of any size. The port is bound
before a model is loaded, so that a taken one is known at once.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address

import uvicorn
from starlette.types import ASGIApp

from muster.errors import MusterError, UsageError
from muster.serve.engine.cores import on_all_cores
from muster.serve.gate import Front
from muster.serve.limits import Limits
from muster.serve.receipt import guarded_protocol

KEEP_ALIVE_S = 30
CLOSING_S = 1
"""Time for what is still running after `shutdown_s`, and for a TLS peer to say goodbye."""
ACCEPTED_AT_ONCE = 16
"""Connections accepted in one turn of the event loop, in which no token goes out."""
OTHER_DESCRIPTORS = 200
"""Open files besides connections."""


def bind(host: str, port: int, *, guarded: bool = False) -> socket.socket:
    """A bound socket that does not listen yet; port 0 takes a free one.

    Raises UsageError for a port in use and, unless the server is `guarded` by keys, for addresses that other
    machines can reach.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} is outside 0 to 65535")
    family, address = _resolve(host, port)
    if not guarded and not ip_address(address[0]).is_loopback:
        raise UsageError(
            f"host {host} is reachable from other machines, so whoever asks needs a key: give --keys FILE or "
            f"MUSTER_KEYS, or use --host 127.0.0.1"
        )
    # With the protocol named, or asyncio would leave Nagle on, and a small piece would wait 40 ms for an ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _bind_error(error, host, port) from None
    return sock


def url_of(sock: socket.socket, *, secure: bool = False) -> str:
    host, port = sock.getsockname()[:2]
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Server(uvicorn.Server):
    """Serves `app` until `should_exit` is set or SIGINT or SIGTERM arrives, both of which are normal ends.

    It is ready, and `on_ready` is called, when `warm_up` has come to its end.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        on_ready: Callable[[], None] | None = None,
        *,
        front: Front | None = None,
        tls: ssl.SSLContext | None = None,
        warm_up: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._on_ready, self._warm_up = on_ready, warm_up
        self._front, self._limits = front or Front(), limits
        self._drained_s: float | None = None
        self._warming: asyncio.Task[None] | None = None
        self._failure: MusterError | None = None
        config = uvicorn.Config(
            app,
            http=guarded_protocol(limits),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=limits.header_bytes,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSING_S,
        )
        config.load()
        config.ssl = tls
        super().__init__(config)

    def serve_on(self, sock: socket.socket) -> None:
        """Listen on a bound socket and serve; blocks until the end, and closes the socket. Raises MusterError when
        the warm-up fails."""
        host, port = sock.getsockname()[:2]
        _allow_descriptors(self._limits.connections + OTHER_DESCRIPTORS)
        try:
            self.run(sockets=[sock])
        except OSError as error:  # another process began to listen between bind and now
            raise _bind_error(error, host, port) from None
        finally:
            sock.close()
        if self._failure is not None:
            raise self._failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Threads that read large bodies, which this one must not take along to where it keeps itself.
        pool = ThreadPoolExecutor(thread_name_prefix="muster-reader", initializer=on_all_cores)
        asyncio.get_running_loop().set_default_executor(pool)
        # uvicorn's own leaves the default of a minute to a client that begins a TLS handshake and says no more.
        secure = self.config.ssl is not None
        make: Callable[[], asyncio.Protocol] = partial(
            self.config.http_protocol_class,  # type: ignore[call-arg]
            config=self.config,
            server_state=self.server_state,
            app_state={},
        )
        self.servers = [
            await asyncio.get_running_loop().create_server(
                make,
                sock=sock,
                ssl=self.config.ssl,
                backlog=ACCEPTED_AT_ONCE,
                ssl_handshake_timeout=self._limits.header_s if secure else None,
                ssl_shutdown_timeout=CLOSING_S if secure else None,
            )
            for sock in sockets or ()
        ]
        for sock in sockets or ():
            sock.listen(self.config.backlog)  # how many may wait, which asyncio takes to be the same
        self.started = True
        self._warming = asyncio.create_task(self._become_ready())

    async def _become_ready(self) -> None:
        try:
            if self._warm_up is not None:
                await self._warm_up()
        except MusterError as error:
            self._failure, self.should_exit = error, True
            return
        if self._front.phase != "starting":
            return  # told to stop meanwhile
        self._front.phase = "ready"
        if self._on_ready is not None:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        if not await super().on_tick(counter):
            return False
        now_s = asyncio.get_running_loop().time()
        if self._drained_s is None:
            self._drained_s = now_s + self._limits.shutdown_s
            self._front.phase = "draining"
            for connection in list(self.server_state.connections):
                connection.drop_partial_body()  # type: ignore[union-attr]
        return self.force_exit or not self.server_state.tasks or now_s >= self._drained_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again after a clean stop, which would turn exit 0 into a kill.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UsageError(f"cannot listen on {host}:{port}: no such address; use --host 127.0.0.1") from None
    return family, (str(address[0]), int(address[1]))


def _bind_error(error: OSError, host: str, port: int) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"port {port} on {host} is in use: stop what listens there, or use --port 0 for a free one"
        )
    if error.errno == errno.EACCES:
        return UsageError(f"port {port} needs privileges: use one above 1023, or --port 0 for a free one")
    return UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}")


def _allow_descriptors(needed: int) -> None:
    """Raise this process's limit of open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < ceiling:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, hard))
