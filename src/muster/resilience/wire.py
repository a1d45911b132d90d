"""Messages between ranks and their coordinator: JSON with its length in front, over TCP."""

from __future__ import annotations

import json
import select
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
_MOST_BYTES = 1 << 20

Message = dict[str, Any]


class Wire:
    """One end of a connection; ConnectionError when the other one is gone or talks nonsense."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._received = connection, bytearray()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        content = json.dumps(message).encode()
        try:
            self._socket.sendall(_LENGTH.pack(len(content)) + content)
        except OSError as error:  # a time-out too: the other end has stopped reading
            raise ConnectionError(str(error)) from error

    def receive(self) -> Message:
        """The next message; waits for it."""
        while (message := self._next()) is None:
            self._read()
        return message

    def arrived(self) -> list[Message]:
        """What can be read now; call it when the socket is readable."""
        self._read()
        found = []
        while (message := self._next()) is not None:
            found.append(message)
        return found

    def has_message(self) -> bool:
        """True if `receive` would not wait."""
        while not self._complete():
            if not select.select([self._socket], [], [], 0)[0]:
                return False
            self._read()
        return True

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> None:
        try:
            content = self._socket.recv(1 << 16)
        except OSError as error:
            raise ConnectionError(str(error)) from error
        if not content:
            raise ConnectionError("the other end closed the connection")
        self._received += content

    def _complete(self) -> int | None:
        """Bytes of the first message with its length, if all of them are here."""
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > _MOST_BYTES:
            raise ConnectionError(f"a message of {length} bytes, where {_MOST_BYTES} is the most")
        end = _LENGTH.size + int(length)
        return end if len(self._received) >= end else None

    def _next(self) -> Message | None:
        end = self._complete()
        if end is None:
            return None
        content = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        try:
            message = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ConnectionError(f"a message that is no JSON: {error}") from error
        if not isinstance(message, dict):
            raise ConnectionError("a message that is no JSON object")
        return message
