"""The memory of other nodes over TCP: each agent serves what its node holds, ranks put copies there and get them back.

A request is JSON with its length in front, and where it says so raw bytes follow; so is the answer. Who does not know
the job's token gets none. Bulk data goes from rank to agent, in threads of its own on both sides: neither the
coordinator nor training's collectives are in its way.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import shutil
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from muster.checkpoint.manifest import FileSum, Manifest, parse, write_summed
from muster.checkpoint.memory import Generation, Held
from muster.checkpoint.snapshot import header_bytes

ENVIRONMENT = "MUSTER_MEMORY"
"""Where a rank finds its node's memory and the others', as JSON."""
_LENGTH = struct.Struct("!I")
_MOST_BYTES = 1 << 28
_PIECE_BYTES = 1 << 20
_TIMEOUT_S = 10.0
"""For a connection, and for each piece."""

Address = tuple[str, int]


class Peer:
    """Another node's memory, a connection for each request. ConnectionError where it is gone or refuses."""

    def __init__(self, address: Address, token: str) -> None:
        self._address, self._token = address, token

    def generations(self) -> dict[Generation, Manifest]:
        with self._asking({"do": "list"}) as (answer, _):
            return {
                Generation(*entry["generation"]): parse(entry["manifest"].encode(), self._where)
                for entry in answer["held"]
            }

    def put(
        self, generation: Generation, name: str, summed: FileSum, pieces: Iterable[bytes | memoryview]
    ) -> None:
        """Have it keep a file, which must arrive as it was summed."""
        request = {"do": "put", "generation": generation, "name": name, "file": asdict(summed)}
        with self._asking(request) as (_, connection):
            for piece in pieces:
                connection.sendall(piece)
            _answer(connection)

    def get(self, generation: Generation, name: str, target: Path) -> FileSum:
        """Copy a file of it to `target`; its sum as it arrived."""
        with self._asking({"do": "get", "generation": generation, "name": name}) as (answer, connection):
            return write_summed(target, _raw(connection, int(answer["bytes"])))

    def head(self, generation: Generation, name: str, target: Path) -> None:
        """A file at `target` with the header of that one and its size, but nothing in it, which takes no memory."""
        request = {"do": "get", "generation": generation, "name": name, "head": True}
        with self._asking(request) as (answer, connection):
            write_summed(target, _raw(connection, int(answer["bytes"])))
        os.truncate(target, int(answer["whole_bytes"]))

    def commit(self, generation: Generation, content: Manifest) -> None:
        with self._asking({"do": "commit", "generation": generation, "content": content.sealed().decode()}):
            pass

    def keep(self, generation: Generation | None) -> None:
        with self._asking({"do": "keep", "generation": generation}):
            pass

    @property
    def _where(self) -> str:
        return "the memory of {}:{}".format(*self._address)

    def __str__(self) -> str:
        return self._where

    @contextlib.contextmanager
    def _asking(self, request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], socket.socket]]:
        with socket.create_connection(self._address, timeout=_TIMEOUT_S) as connection:
            _send(connection, request | {"token": self._token})
            yield _answer(connection), connection


class Server:
    """Serves what a node holds to whoever has the token, a thread for each connection."""

    def __init__(self, held: Held, host: str, token: str) -> None:
        self._held, self._token = held, token
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._listener = socket.create_server((host, 0), family=family)
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, name="muster-memory", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(_TIMEOUT_S)
        with connection, contextlib.suppress(OSError):  # gone, or too slow: it asks again if it wants to
            try:
                self._do(_receive(connection), connection)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                _send(connection, {"error": f"no request of ours ({error})"})
            except Exception as error:
                _send(connection, {"error": str(error)})
        self._connections.discard(connection)

    def _do(self, request: dict[str, Any], connection: socket.socket) -> None:
        if not hmac.compare_digest(str(request["token"]).encode(), self._token.encode()):
            raise ConnectionError("a stranger")
        what, said = request["do"], request.get("generation")
        generation = None if said is None else Generation(*map(int, said))
        if what == "list":
            held = [
                {"generation": one, "manifest": content.sealed().decode()}
                for one, content in self._held.generations().items()
            ]
            _send(connection, {"held": held})
        elif what == "keep":
            self._held.keep(generation)
            _send(connection, {})
        elif generation is None:
            raise ValueError("it names no generation")
        elif what == "put":
            self._take(generation, str(request["name"]), FileSum(**request["file"]), connection)
        elif what == "get":
            path = self._held.file_of(generation, str(request["name"]))
            self._give(path, connection, head=bool(request.get("head")))
        elif what == "commit":
            self._held.commit(generation, parse(request["content"].encode(), "the request"))
            _send(connection, {})

    def _take(self, generation: Generation, name: str, said: FileSum, connection: socket.socket) -> None:
        free = shutil.disk_usage(self._held.begin(generation)).free
        if said.bytes > free:
            raise OSError(f"no room for {said.bytes / 1e6:.0f} MB where {free / 1e6:.0f} MB are free")
        _send(connection, {})
        self._held.put(generation, name, _raw(connection, said.bytes), said)
        _send(connection, {})

    def _give(self, path: Path, connection: socket.socket, *, head: bool) -> None:
        with path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size
            count = min(header_bytes(file.read(8)), whole) if head else whole
            _send(connection, {"bytes": count, "whole_bytes": whole})
            connection.sendfile(file, 0, count)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What a rank knows of the memory of its node and of the others."""

    own: Held
    others: tuple[Peer, ...]
    """In the order in which they are asked to keep copies: those that follow in the ring."""
    attempt: int

    @staticmethod
    def from_environment() -> Neighbours | None:
        """None for ranks that no agent with memory to spare has started."""
        said = os.environ.get(ENVIRONMENT)
        if said is None:
            return None
        plain = json.loads(said)
        others = tuple(Peer((host, port), plain["token"]) for host, port in plain["others"])
        return Neighbours(Held(Path(plain["root"])), others, plain["attempt"])


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _answer(connection: socket.socket) -> dict[str, Any]:
    answer = _receive(connection)
    if "error" in answer:
        raise ConnectionError(answer["error"])
    return answer


def _receive(connection: socket.socket) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(b"".join(map(bytes, _raw(connection, _LENGTH.size))))
    if length > _MOST_BYTES:
        raise ConnectionError(f"a message of {length} bytes, where {_MOST_BYTES} is the most")
    message = json.loads(b"".join(map(bytes, _raw(connection, length))))
    if not isinstance(message, dict):
        raise ConnectionError("a message that is no JSON object")
    return message


def _raw(connection: socket.socket, length: int) -> Iterator[memoryview]:
    """So many bytes; each piece is valid until the next one is asked for."""
    buffer = memoryview(bytearray(min(_PIECE_BYTES, length)))
    while length:
        count = connection.recv_into(buffer, min(len(buffer), length))
        if not count:
            raise ConnectionError("the other end closed the connection")
        yield buffer[:count]
        length -= count
