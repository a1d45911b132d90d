"""Where the body of a stream goes: straight to its connection.

An ASGI message for each piece would cost more than all the rest of it; an answer's begin and end still go by ASGI.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.types import Scope

_KEY = "muster.outlet"


class Line(Protocol):
    """A connection that sends together what is written in one turn of the event loop, or at once what is pushed."""

    def write(self, data: bytes) -> None: ...

    def push(self, data: bytes) -> None: ...

    def is_closing(self) -> bool: ...


class Outlet:
    """Takes the body of one answer between its first and its last ASGI message. `is_paused` says whether the client is
    so far behind that nothing more should be written now."""

    def __init__(self, line: Line, is_paused: Callable[[], bool], *, chunked: bool) -> None:
        self._line, self._is_paused, self._chunked = line, is_paused, chunked
        self.on_room: Callable[[], None] = lambda: None
        """Called when it is paused no longer."""

    @property
    def paused(self) -> bool:
        return self._is_paused()

    def write(self, data: bytes) -> None:
        """Send some bytes, not none: in chunked transfer coding those would be the end."""
        if not self._line.is_closing():
            self._line.write(self._framed(data))

    def push(self, data: bytes) -> None:
        """The same for what nothing follows in this turn of the event loop."""
        if not self._line.is_closing():
            self._line.push(self._framed(data))

    def enter(self, scope: Scope) -> None:
        """Make it known to whoever answers."""
        scope.setdefault("extensions", {})[_KEY] = self

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    @classmethod
    def of(cls, scope: Scope) -> Outlet:
        outlet: Outlet = scope["extensions"][_KEY]
        return outlet
