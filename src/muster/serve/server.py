"""The socket: uvicorn with h11, receipt deadlines, byte limits and an end that always comes.

h11 is forced because httptools, which uvicorn prefers where it is installed, accepts headers of any
size. The port is bound before a model is loaded, so that a taken one is known at once.
"""

from __future__ import annotations

import errno
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address

import uvicorn
from starlette.types import ASGIApp

from muster.errors import UsageError
from muster.serve.limits import Limits
from muster.serve.receipt import guarded_protocol

KEEP_ALIVE_S = 30


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; port 0 takes a free one.

    Raises UsageError for a port in use and for addresses that other machines can reach: there are
    no keys yet, so whoever reaches the server may use it.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} is outside 0 to 65535")
    family, address = _resolve(host, port)
    if not ip_address(address[0]).is_loopback:
        raise UsageError(
            f"host {host} is reachable from other machines, and muster serve has no authentication yet: "
            f"use --host 127.0.0.1, and a reverse proxy or an ssh tunnel for access from elsewhere"
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


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves `app` until `should_exit` is set or SIGINT or SIGTERM arrives, both of which are normal ends."""

    def __init__(self, app: ASGIApp, limits: Limits, on_ready: Callable[[], None] | None = None) -> None:
        self._on_ready = on_ready
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
            limit_concurrency=limits.connections,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(limits.shutdown_s),
        )
        super().__init__(config)

    def serve_on(self, sock: socket.socket) -> None:
        """Listen on a bound socket and serve; blocks until the end, and closes the socket."""
        host, port = sock.getsockname()[:2]
        try:
            self.run(sockets=[sock])
        except OSError as error:  # another process began to listen between bind and now
            raise _bind_error(error, host, port) from None
        finally:
            sock.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()

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
