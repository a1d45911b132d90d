"""The coordinator of replica groups: `membership.py` on real sockets.

It lives in the process that starts the groups. When that process dies, so do the ranks, and the run goes on from its
checkpoint: a journal of its own would only repeat what the checkpoint says. Knows nothing of processes or tensors.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import asdict

from muster.config.faults import Timeouts
from muster.resilience.membership import Action, Decide, Load, Membership, Vote
from muster.resilience.wire import Message, Wire

_SEND_S = 1.0
"""A rank that does not take a few hundred bytes for so long has stopped."""


class Coordinator:
    """Serves the ranks of `groups` groups on loopback; `handle` gets the actions that are not messages."""

    def __init__(
        self, groups: int, ranks: int, timeouts: Timeouts, handle: Callable[[list[Action]], None]
    ) -> None:
        self.membership = Membership(groups, ranks, timeouts, time.monotonic())
        self.token = secrets.token_hex(16)
        self._handle = handle
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._ranks: dict[Wire, tuple[int, int]] = {}

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def serve(self, seconds: float) -> None:
        """Do what is to be done within the next `seconds`."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            due = self.membership.due()
            wait = left if due is None else min(left, max(due - time.monotonic(), 0))
            for key, _ in self._selector.select(wait):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, Wire):
                    self._read(key.fileobj)
            if due is not None and time.monotonic() >= due:
                self._do(self.membership.tick(time.monotonic()))

    def gone(self, group: int) -> None:
        """The group's processes have ended, or are about to."""
        known = [wire for wire, (owner, _) in self._ranks.items() if owner == group]
        for wire in known:
            self._drop(wire)
        self._do(self.membership.gone(time.monotonic(), group))

    def given_up(self) -> None:
        """A group that has gone will not be started again."""
        self._do(self.membership.given_up(time.monotonic()))

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, Wire | socket.socket):
                key.fileobj.close()
        self._selector.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(_SEND_S)
        self._selector.register(Wire(connection), selectors.EVENT_READ)

    def _read(self, wire: Wire) -> None:
        try:
            for message in wire.arrived():
                self._take(wire, message)
        except (ConnectionError, KeyError, TypeError, ValueError):
            self._lose(wire)

    def _take(self, wire: Wire, message: Message) -> None:
        now = time.monotonic()
        kind = message["kind"]
        if kind == "hello":
            if not hmac.compare_digest(str(message["token"]), self.token):
                raise ConnectionError("a stranger")
            self._ranks[wire] = group, rank = int(message["group"]), int(message["rank"])
            self._do(self.membership.hello(now, group, rank))
            return
        group, rank = self._ranks[wire]
        if kind == "loaded":
            self._do(self.membership.loaded(now, group, rank))
        elif kind == "holds":
            self._do(self.membership.holds(group, rank, int(message["epoch"])))
        elif kind == "vote":
            vote = Vote(**{name: value for name, value in message.items() if name != "kind"})
            self._do(self.membership.vote(now, group, rank, vote))

    def _do(self, actions: list[Action]) -> None:
        self._handle(actions)  # so the ledger has a step before any rank takes it
        for action in actions:
            if isinstance(action, Load):
                self._send({action.group}, {"kind": "load"})
            elif isinstance(action, Decide):
                view = asdict(action.view) | {"sources": list(action.view.sources.items())}
                self._send(
                    set(action.view.members), {"kind": "decision", "committed": action.committed} | view
                )

    def _send(self, groups: set[int], message: Message) -> None:
        broken = []
        for wire, (group, _) in list(self._ranks.items()):
            if group in groups:
                try:
                    wire.send(message)
                except ConnectionError:
                    broken.append(wire)
        for wire in broken:
            self._lose(wire)

    def _lose(self, wire: Wire) -> None:
        """A connection ended: with it, its group."""
        known = self._ranks.get(wire)
        self._drop(wire)
        if known is not None:
            self.gone(known[0])

    def _drop(self, wire: Wire) -> None:
        if wire.fileno() >= 0:
            self._selector.unregister(wire)
            wire.close()
        self._ranks.pop(wire, None)
