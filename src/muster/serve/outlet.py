"""Where the body of a stream goes: straight to its connection.

An ASGI message for each piece would cost more than all the rest of it; an answer's begin and end still go by ASGI.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.types import Scope

_KEY = "muster.outlet"


class Outlet:
    """Takes the body of one answer between its first and its last ASGI message. `is_paused` says whether the client is
    so far behind that nothing more should be written now."""

    def __init__(
        self, transport: asyncio.WriteTransport, is_paused: Callable[[], bool], *, chunked: bool
    ) -> None:
        self._transport, self._is_paused, self._chunked = transport, is_paused, chunked
        self.on_room: Callable[[], None] = lambda: None
        """Called when it is paused no longer."""

    @property
    def paused(self) -> bool:
        return self._is_paused()

    def write(self, data: bytes) -> None:
        """Send some bytes, not none: in chunked transfer coding those would be the end."""
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def enter(self, scope: Scope) -> None:
        """Make it known to whoever answers."""
        scope.setdefault("extensions", {})[_KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> Outlet:
        outlet: Outlet = scope["extensions"][_KEY]
        return outlet
