"""Carries the coordinator's orders to the agents of a job: JSON objects, one a line, over TCP or a socket pair.

One agent runs the server, in a thread: the one that can listen at the rendezvous address. A connection that closes is
a node that is lost: at once if its agent was killed, after some ten seconds if its machine was. What travels is data
only: what an agent runs is its own command line, with sizes of the layout's axes, never words that it was sent.

Both ends say something now and then. An end that is silent for `SILENCE_S` is as good as closed: its process is
stopped, or what lies between swallows everything, and neither system may ever tell.
"""

from __future__ import annotations

import contextlib
import json
import re
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from muster.errors import Preempted, UsageError
from muster.observe import term
from muster.observe.records import RunLog
from muster.resilience.budget import Failure
from muster.resilience.coordinator import Action, Coordinator, End, Outcome, Say, Start, Stop

_LINE_LIMIT_BYTES = 1 << 18
_TICK_S = 0.05
_FAREWELL_S = 5.0
"""How long the server waits for the agents to hear the end."""
_CONNECT_S = 5.0
BEAT_S = 2.0
SILENCE_S = 30.0
"""Long enough for an agent that waits until torch is loaded."""

Message = dict[str, Any]


class Monitor(Protocol):
    """Watches the ranks of each attempt, in the coordinator's thread: its calls should return at once."""

    def begin(self, store: TCPStore, world: int) -> None:
        """The ranks of an attempt are being started; they meet at `store`."""

    def look(self) -> str | None:
        """Called some 20 times a second while ranks run; a sentence has all ranks killed and restarted."""

    def explain(self, failure: Failure) -> Failure:
        """The failure that ended the attempt, or what is known better about it; called once no rank is left."""


class Closed(Exception):
    """The other end of a link has gone."""


class Link:
    """One end of a connection between an agent and the coordinator."""

    def __init__(self, connection: socket.socket, *, local: bool = False) -> None:
        """`local`: the other end is a thread of this process, which stops and goes on with it."""
        self._socket, self._rest, self._local = connection, b"", local
        self._said = self._heard = time.monotonic()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def host(self) -> str:
        """Address by which the other end knows this machine."""
        return str(self._socket.getsockname()[0])

    def send(self, message: Message) -> None:
        self._said = time.monotonic()
        with contextlib.suppress(OSError):  # gone: the next read says so
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def beat(self) -> None:
        """Be heard, and notice when nothing is: Closed after SILENCE_S. Call it many times in that."""
        now = time.monotonic()
        if now - self._heard > SILENCE_S and not self._local:
            raise Closed
        if now - self._said > BEAT_S and not self._local:
            self.send({"type": "beat"})

    def read(self) -> list[Message]:
        """The messages that have come, after `select` said that some have; Closed at the end."""
        try:
            received = self._socket.recv(1 << 16)
        except OSError:
            received = b""
        if not received or len(self._rest) > _LINE_LIMIT_BYTES:
            raise Closed
        *lines, self._rest = (self._rest + received).split(b"\n")
        try:
            self._heard = time.monotonic()
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise Closed from None
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        self._socket.close()


def parse_address(text: str) -> tuple[str, int]:
    """`HOST:PORT`; UsageError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UsageError(f"--rendezvous should be HOST:PORT, for example node0:29400 (got '{text}')")
    return host.strip("[]"), int(port)


def listen(address: tuple[str, int]) -> socket.socket | None:
    """A listening socket, or None where the address is another machine's, or taken."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError:
        return None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
    except OSError:
        listener.close()
        return None
    return listener


def connect(address: tuple[str, int]) -> Link | None:
    """A link to the coordinator at an address; None if nobody answers there now."""
    try:
        connection = socket.create_connection(address, timeout=_CONNECT_S)
    except OSError:
        return None
    connection.settimeout(None)
    _notice_death(connection)
    return Link(connection)


@dataclass(kw_only=True)
class Server:
    """The coordinator's thread and its connections."""

    coordinator: Coordinator
    listener: socket.socket | None
    """None where the only agent is this process's."""
    host: str
    """Name or address by which ranks reach this machine."""
    digest: str
    """Of the run, which every agent must have loaded."""
    log: RunLog
    """Of the run; closed with this."""
    monitor: Monitor | None = None
    _links: dict[str, Link] = field(default_factory=dict, init=False)
    _memories: dict[str, list[Any]] = field(default_factory=dict, init=False)
    """Host and port of each node's memory, where it has some to spare."""
    _store: TCPStore | None = field(default=None, init=False)
    _thread: threading.Thread = field(init=False)
    _closing: bool = field(default=False, init=False)

    def start(self) -> Link:
        """Serve; the link is for this process's own agent."""
        if self.monitor is not None:
            self.coordinator.explain = self.monitor.explain
        here, there = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, args=(Link(there, local=True),), daemon=True)
        self._thread.start()
        return Link(here, local=True)

    def close(self) -> None:
        self._closing = True
        self._thread.join(timeout=2 * _FAREWELL_S)
        self.log.close()

    def _serve(self, own: Link) -> None:
        selector = selectors.DefaultSelector()
        selector.register(own, selectors.EVENT_READ, own)
        if self.listener is not None:
            selector.register(self.listener, selectors.EVENT_READ, None)
        links = {own}
        farewell = float("inf")

        def drop(link: Link) -> None:
            selector.unregister(link)
            links.discard(link)
            link.close()
            self._lost(link)

        try:
            while links and not self._closing and time.monotonic() < farewell:
                for key, _ in selector.select(timeout=_TICK_S):
                    if key.data is None:
                        assert self.listener is not None
                        with contextlib.suppress(OSError):
                            connection, _ = self.listener.accept()
                            _notice_death(connection)
                            link = Link(connection)
                            links.add(link)
                            selector.register(link, selectors.EVENT_READ, link)
                        continue
                    link = key.data
                    try:
                        for message in link.read():
                            self._hear(link, message)
                    except (Closed, KeyError, TypeError, ValueError):  # gone, or no agent of ours
                        drop(link)
                for link in list(links):
                    try:
                        link.beat()
                    except Closed:
                        drop(link)
                self._tick()
                if self.coordinator.over and farewell == float("inf"):
                    farewell = time.monotonic() + _FAREWELL_S
        finally:
            if not self.coordinator.over:
                self._do(
                    [End(Preempted.exit_code, "the node at the rendezvous was stopped: start all again")]
                )
            for link in links:
                link.close()
            if self.listener is not None:
                self.listener.close()
            selector.close()
            self._store = None

    def _hear(self, link: Link, message: Message) -> None:
        now = time.monotonic()
        if message["type"] == "join":
            if message["digest"] != self.digest:
                say = "this node's run file differs from that of the node at the rendezvous: start all with the same"
                link.send({"type": "end", "exit_code": UsageError.exit_code, "sentence": say})
                return
            name = self._name(str(message["host"]))
            self._links[name] = link
            if message.get("memory") is not None:
                self._memories[name] = [str(message["memory"][0]), int(message["memory"][1])]
            link.send({"type": "welcome", "name": name})
            self._do(self.coordinator.joined(name, int(message["slots"]), now))
        elif message["type"] == "ended":
            failure = message["failure"]
            outcome = Outcome(
                kind=message["kind"],
                sentence=str(message["sentence"]),
                failure=None if failure is None else Failure(**failure),
                leaving=bool(message["leaving"]),
            )
            for name in self._names(link):
                self._do(self.coordinator.ended(name, outcome, now))

    def _lost(self, link: Link) -> None:
        for name in self._names(link):
            del self._links[name]
            self._memories.pop(name, None)
            self._do(self.coordinator.lost(name, time.monotonic()))

    def _tick(self) -> None:
        now = time.monotonic()
        if self.monitor is not None and self.coordinator.alive:
            complaint = self.monitor.look()
            if complaint is not None:
                self._do(self.coordinator.complain(complaint, now))
        self._do(self.coordinator.tick(now))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                # A store for each attempt: nothing of the last one can be met in it.
                self._store = TCPStore(self.host, 0, is_master=True, wait_for_workers=False)
                turn = term.new()
                term.grant(self.log.folder, turn)
                if self.monitor is not None:
                    self.monitor.begin(self._store, action.world)
                begun = int(time.time() * 1000)
                for name, (first, ranks) in action.places.items():
                    place = {"first": first, "ranks": ranks, "world": action.world, "attempt": action.attempt}
                    meet = {"host": self.host, "port": self._store.port, "term": turn}
                    memory = {"attempt": begun, "others": self._others(name, list(action.places))}
                    start = {"type": "start", "place": place | meet, "sizes": action.sizes, "memory": memory}
                    self._tell(name, start)
            elif isinstance(action, Stop):
                for name in action.nodes:
                    self._tell(name, {"type": "stop", "how": action.how})
            elif isinstance(action, Say):
                self.log.event(action.kind, message=action.sentence, **action.fields)
                for name in self._links:
                    self._tell(name, {"type": "say", "sentence": action.sentence})
            elif isinstance(action, End):
                for name in self._links:
                    end = {"type": "end", "exit_code": action.exit_code, "sentence": action.sentence}
                    self._tell(name, end)

    def _others(self, name: str, placed: list[str]) -> list[list[Any]]:
        """The memories of all other nodes, those that follow in the ring of nodes first; spares come after."""
        ring = placed + [one for one in self._links if one not in placed]
        where = ring.index(name)
        return [self._memories[one] for one in ring[where + 1 :] + ring[:where] if one in self._memories]

    def _tell(self, name: str, message: Message) -> None:
        if name in self._links:
            self._links[name].send(message)

    def _names(self, link: Link) -> list[str]:
        return [name for name, one in self._links.items() if one is link]

    def _name(self, host: str) -> str:
        """A node's name is its host's, so that it is known again when it comes back."""
        names = [host, *(f"{host}-{number}" for number in range(2, len(self._links) + 2))]
        return next(name for name in names if name not in self._links)


def _notice_death(connection: socket.socket) -> None:
    """Have the system close a connection to a machine that has not answered for some ten seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 4),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 10_000),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
