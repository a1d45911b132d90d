"""Deadlines for receiving a request and for reading its answer, which uvicorn does not have.

Without them a client that sends half a header, or half a body, holds its connection for ever and
delays shutdown (uvicorn closes only idle keep-alive connections). Where there are too many
connections, the one makes room that has been without a complete request for longest. A small layer over
uvicorn's h11 protocol; h11 itself bounds the size of a header. Private names of uvicorn are used here and
nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from muster.serve.failures import error_body
from muster.serve.limits import Limits
from muster.serve.outlet import Outlet

CROWD = 100
"""So many connections without a complete request have deadlines anywhere in the later half of the time that others
have: what came at once is not due at once, each with the one that its client opens instead."""
EXPIRY_GAP_S = 0.001
"""From one connection that is closed at its deadline to the next, at least."""

Phase = Literal["header", "body"]


def guarded_protocol(limits: Limits) -> type[H11Protocol]:
    """A uvicorn protocol class that keeps `header_s`, `body_s`, `stalled_write_s` and `connections` of `limits`."""
    shared = {"limits": limits, "expendable": {}, "expiry": Spaced()}
    return type("GuardedProtocol", (_GuardedProtocol,), shared)


class Spaced:
    """Times for what may come due for a thousand connections at once: apart, so that answers go out between them."""

    def __init__(self) -> None:
        self._last_s = 0.0

    def after(self, now_s: float) -> float:
        """The next time that is not before `now_s`."""
        self._last_s = max(now_s, self._last_s + EXPIRY_GAP_S)
        return self._last_s


class _Gathered:
    """A transport that sends as one piece what is written in one turn of the event loop: a header with what follows
    it, an answer's end with what is before it. Each piece costs a call of the system, and wakes the client up. What
    nothing follows in its turn is pushed out at once, which saves the loop another turn."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if data:
            if not self._pieces:
                self._loop.call_soon(self._send)
            self._pieces.append(data)

    def push(self, data: bytes) -> None:
        """Send it with what is there, without waiting for more."""
        self._pieces.append(data)
        self._send()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._transport.write(b"".join(pieces))


class _GuardedProtocol(H11Protocol):
    limits: Limits
    expendable: dict[_GuardedProtocol, None]
    """Of all connections, those without a complete request, the longest so first."""
    expiry: Spaced

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._awaited: tuple[Phase, object] | None = None
        """What is being received, with the request before it: the next one gets a deadline of its own."""
        self._receipt_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._outlet: Outlet | None = None
        """Of the latest request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._line = _Gathered(transport, self.loop)
        super().connection_made(self._line)  # type: ignore[arg-type]
        self.expendable[self] = None
        self._watch_receipt()
        if len(self.connections) > self.limits.connections:
            next(iter(self.expendable)).make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self.expendable.pop(self, None)
        self._stop(self._receipt_timer)
        self._stop(self._write_timer)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # what answers it has not begun
            chunked = self.scope["http_version"] == "1.1"
            self._outlet = Outlet(self._line, lambda: self.flow.write_paused, chunked=chunked)
            self._outlet.enter(self.scope)  # type: ignore[arg-type]
        self._watch_receipt()
        if self._is_served():
            self.expendable.pop(self, None)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_served() and not self.transport.is_closing():
            self.expendable.setdefault(self)

    def shutdown(self) -> None:
        if not self.drop_partial_body():
            super().shutdown()

    def drop_partial_body(self) -> bool:
        """Refuse what is still being sent, as the server is stopping; False where that is no body."""
        if self._awaited is None or self._awaited[0] != "body":
            return False
        self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the server is stopping")
        return True

    def make_room(self) -> None:
        """Close the connection for one that came later."""
        self.expendable.pop(self, None)
        if self._awaited is None:
            self.transport.close()  # between requests
        else:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the server has too many connections")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.stalled_write_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop(self._write_timer)
        super().resume_writing()
        if self._outlet is not None:
            self._outlet.on_room()

    def send_400_response(self, msg: str) -> None:
        # uvicorn calls this while it handles h11's error, which knows the better status (431, 414, ...).
        # Its 501 (a transfer coding other than chunked) is the client's fault, too.
        hint = getattr(sys.exception(), "error_status_hint", HTTPStatus.BAD_REQUEST)
        status = HTTPStatus(hint if hint < 500 else HTTPStatus.BAD_REQUEST)
        message = "the request is not valid HTTP/1.1"
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            message = f"the request's header is larger than {self.limits.header_bytes} bytes"
        self._refuse(status, message)

    def _watch_receipt(self) -> None:
        phase = self._phase()
        awaited = None if phase is None else (phase, self.cycle)
        if awaited == self._awaited:
            return  # its deadline runs already: single bytes do not extend it
        self._awaited = awaited
        self._stop(self._receipt_timer)
        if phase is not None and not self.transport.is_closing():
            limit_s = self.limits.header_s if phase == "header" else self.limits.body_s
            due_s = limit_s * random.uniform(0.5, 1) if len(self.expendable) > CROWD else limit_s
            self._receipt_timer = self.loop.call_later(due_s, self._receipt_expired, phase, limit_s)

    def _phase(self) -> Phase | None:
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is not h11.IDLE:
            return None
        idle = self._had_request() and not self._has_bytes()  # between requests: uvicorn's keep-alive timer
        return None if idle else "header"

    def _had_request(self) -> bool:
        cycle: object = self.cycle  # None until there was one, whatever its annotation says
        return cycle is not None

    def _is_served(self) -> bool:
        """Whether a complete request is being answered."""
        return (
            self._had_request()
            and not self.cycle.response_complete
            and self.conn.their_state is not h11.SEND_BODY
        )

    def _has_bytes(self) -> bool:
        return bool(self.conn.trailing_data[0])

    def _receipt_expired(self, phase: Phase, limit_s: float) -> None:
        now_s = self.loop.time()
        if (turn_s := self.expiry.after(now_s)) > now_s:
            self._receipt_timer = self.loop.call_at(turn_s, self._give_up, phase, limit_s)
        else:
            self._give_up(phase, limit_s)

    def _give_up(self, phase: Phase, limit_s: float) -> None:
        if not self._had_request() and not self._has_bytes():
            self.transport.close()  # nothing was ever sent: there is no request to answer
        else:
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT, f"the {phase} was not complete in time, at most {limit_s:g} s"
            )

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer with an error if no answer has begun, then close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_refusal(status, message))
        if self._had_request() and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the app sees its client gone
            self.cycle.message_event.set()
        self.transport.close()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


@lru_cache(maxsize=64)
def _refusal(status: HTTPStatus, message: str) -> bytes:
    """A whole response, after which the connection is closed. h11 would take longer to make it than all the rest of a
    connection, and a thousand may be due at once."""
    body = json.dumps(error_body(status, message)).encode()
    head = (
        f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
