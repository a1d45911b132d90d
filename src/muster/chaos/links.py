"""A TCP proxy whose lines have weather: latency, jitter, limited bandwidth, stalls and resets. No root is needed.

`Switchboard` serves in a thread of its own. Ranks ask it for a line to where they want to go (`within.py`); others
get one with `line`. All traffic passes unchanged but for the addresses of gloo's listeners (see `_Addresses`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
_CHUNK_BYTES = 1 << 16
_IN_FLIGHT = 64
"""Chunks on their way in one direction, after which the sender has to wait."""
_LISTENER = re.compile(rb"\x00\x00\x02\x00(..)\x7f\x00\x00\x01\x00{8}", re.DOTALL)
"""A sockaddr_in of 127.0.0.1 as Linux has it in memory: what gloo's ranks tell each other through the store."""
_UNUSED_PORTS = range(10_000, 32_000)
"""Below those that Linux gives to listeners who do not choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weather:
    latency_s: float = 0.0
    jitter_s: float = 0.0
    """Each chunk takes up to this much longer, without overtaking another."""
    bytes_per_s: float | None = None
    stalled: bool = False
    """Nothing arrives, and nobody is told."""


FAIR = Weather()


@dataclass(eq=False)
class Line:
    """All connections of one rank to one place, and their weather."""

    who: str
    """`rank 1`, or whatever asked for it."""
    what: str
    """`store`, `membership`, `meeting`, `peers`, ..."""
    target: tuple[str, int]
    port: int = 0
    """Where it is entered, on 127.0.0.1."""
    weather: Weather = FAIR
    carried_bytes: int = 0
    connections: int = 0
    """Those that were ever made."""
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _cleared: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        return bool(self._open)

    def __str__(self) -> str:
        return f"{self.who}'s link to {'its ' if self.what == 'peers' else 'the '}{self.what}"


class Switchboard:
    """Use as a context manager. `address` is the Unix socket that asks for lines are sent to."""

    def __init__(self, seed: int = 0) -> None:
        self.lines: list[Line] = []
        self._chance = random.Random(seed)
        self._folder = tempfile.TemporaryDirectory(prefix="muster-chaos-")
        self.address = str(Path(self._folder.name) / "lines")
        self._loop = asyncio.new_event_loop()
        self._servers: list[asyncio.Server] = []
        self._joined = set[asyncio.Task[None]]()
        self._asking = set[asyncio.StreamWriter]()
        self._thread = threading.Thread(target=self._loop.run_forever, name="muster-links", daemon=True)

    def __enter__(self) -> Switchboard:
        self._thread.start()
        self._run(self._serve())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.cleanup()

    def line(self, target: tuple[str, int], *, who: str, what: str) -> Line:
        """A new line to `target`."""
        return self._run(self._open_line(Line(who, what, target), None))

    def set(self, line: Line, weather: Weather) -> None:
        self._loop.call_soon_threadsafe(self._change, line, weather)

    def reset(self, line: Line) -> None:
        """Break all its connections, as a firewall that has forgotten them: both ends get an RST."""
        self._loop.call_soon_threadsafe(self._break, line)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _serve(self) -> None:
        self._servers.append(await asyncio.start_unix_server(self._ask, self.address))

    async def _close(self) -> None:
        # Who is on the doorstep is let in first: of a server that has closed, asyncio would leave their sockets open.
        for server in self._servers:
            for listener in server.sockets:
                self._loop.remove_reader(listener.fileno())
        await _turns()
        for server in self._servers:
            server.close()
        for line in list(self.lines):
            self._break(line)
        for asking in self._asking:
            asking.transport.abort()
        while self._joined:  # one more may have been let in meanwhile
            for task in self._joined:
                task.cancel()
            await asyncio.gather(*self._joined, return_exceptions=True)
            await _turns()
        for line in list(self.lines):  # what was cancelled before it began has closed nothing
            self._break(line)
        await _turns()  # a socket is closed in the turn after the one in which that is asked for

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._asking.add(writer)
        with contextlib.suppress(OSError, ValueError, KeyError):
            asked = json.loads(await reader.readline())
            line = Line(str(asked["who"]), str(asked["what"]), (str(asked["host"]), int(asked["port"])))
            addresses = _Addresses(self) if asked["what"].endswith("store") else None
            await self._open_line(line, addresses)
            writer.write(json.dumps({"port": line.port}).encode() + b"\n")
            await writer.drain()
        self._asking.discard(writer)
        writer.close()

    async def _open_line(self, line: Line, addresses: _Addresses | None, port: int = 0) -> Line:
        async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.CancelledError):  # the switchboard closes
                await self._join(line, reader, writer, addresses)
            if line.what == "peers" and not line.alive:  # gloo connects once
                server.close()
                self.lines.remove(line)

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line.connections += 1
            line._open.add(writer)
            task = self._loop.create_task(join(reader, writer))
            self._joined.add(task)
            task.add_done_callback(self._joined.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", port)
        self._servers.append(server)
        line.port = server.sockets[0].getsockname()[1]
        line._cleared.set()
        self.lines.append(line)
        return line

    async def peer_line(self, who: str, target: int, own: int) -> int:
        """A line to a gloo listener; the port at which it is entered, or the listener's own where none will do."""
        line = Line(who, "peers", ("127.0.0.1", target))
        for port in self._chance.sample(_UNUSED_PORTS, 1000):
            if _order(port) < _order(own):
                with contextlib.suppress(OSError):
                    return (await self._open_line(line, None, port)).port
        return target

    async def _join(
        self,
        line: Line,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        addresses: _Addresses | None,
    ) -> None:
        there: asyncio.StreamWriter | None = None
        try:
            await line._cleared.wait()
            beyond, there = await asyncio.open_connection(*line.target)
            line._open.add(there)
            for one in (writer, there):
                one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            out = None if addresses is None else addresses.told
            back = None if addresses is None else addresses.asked
            who = line.who
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(line, reader, there, who, out))
                both.create_task(self._carry(line, beyond, writer, who, back))
        except* OSError:
            pass
        finally:
            for end in (writer, there):
                if end is not None:
                    line._open.discard(end)
                    end.close()

    async def _carry(
        self, line: Line, source: asyncio.StreamReader, sink: asyncio.StreamWriter, who: str, rewrite: Any
    ) -> None:
        """One direction, until its source ends: then the sink hears of that end."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)

        async def deliver() -> None:
            while True:
                due, chunk = await chunks.get()
                await asyncio.sleep(max(due - time.monotonic(), 0))
                await line._cleared.wait()
                if not chunk:
                    sink.write_eof()
                    return
                if line.weather.bytes_per_s:
                    await asyncio.sleep(len(chunk) / line.weather.bytes_per_s)
                sink.write(chunk if rewrite is None else await rewrite(who, chunk))
                await sink.drain()

        async def collect() -> None:
            while True:
                chunk = await source.read(_CHUNK_BYTES)
                weather = line.weather
                late_s = weather.latency_s + weather.jitter_s * self._chance.random()
                line.carried_bytes += len(chunk)
                await chunks.put((time.monotonic() + late_s, chunk))
                if not chunk:
                    return

        async with asyncio.TaskGroup() as pair:
            pair.create_task(deliver())
            pair.create_task(collect())

    def _change(self, line: Line, weather: Weather) -> None:
        line.weather = weather
        (line._cleared.clear if weather.stalled else line._cleared.set)()

    def _break(self, line: Line) -> None:
        for writer in list(line._open):
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0)  # close says RST
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class _Addresses:
    """Has a rank reach its peers by lines of this switchboard.

    Ranks put the address of their gloo listener into the store. Of two of them, one listens and the other connects
    (gloo/transport/tcp/pair.cc: that with the higher address), so addresses lower than the rank's own are exchanged for
    that of a line, at a port that is lower as well. They are of one length, and nothing else of the traffic is touched.
    """

    def __init__(self, board: Switchboard) -> None:
        self._board, self._own, self._ports = board, 0, dict[int, int]()

    async def told(self, _who: str, chunk: bytes) -> bytes:
        """What the rank tells the store."""
        for found in _LISTENER.finditer(chunk):
            self._own = int.from_bytes(found[1], "big")
        return chunk

    async def asked(self, who: str, chunk: bytes) -> bytes:
        """What the store answers."""
        content = bytearray(chunk)
        for found in _LISTENER.finditer(chunk):
            port = int.from_bytes(found[1], "big")
            if _order(port) < _order(self._own):
                if port not in self._ports:
                    self._ports[port] = await self._board.peer_line(who, port, self._own)
                content[found.start(1) : found.end(1)] = self._ports[port].to_bytes(2, "big")
        return bytes(content)


def _order(port: int) -> int:
    """Of addresses, as gloo compares them: the bytes of the network, read by a little-endian machine."""
    return int.from_bytes(port.to_bytes(2, "big"), "little")
