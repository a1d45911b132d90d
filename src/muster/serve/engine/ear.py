"""Hears what the engine's process says on the event loop that answers, which is what a step wakes up.

A thread that read it would be woken up first, and would then wake the loop: two switches a step, of what shares its
cores with the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from muster.serve.engine.wire import Wire


class Ear:
    """Calls `heard` with the messages that have come, in order: on the loop, or in `finish`."""

    def __init__(self, heard: Callable[[Sequence[dict[str, Any]]], None]) -> None:
        self._heard = heard
        self._receiving = threading.Lock()
        self._wire: Wire | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def on_this_loop(self) -> None:
        """Hear on the loop that runs, from now on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._attend()

    def turn_to(self, wire: Wire) -> None:
        """Hear this one from now on, on the loop that there is, or will be."""
        self._wire = wire
        self._on_loop(self._attend)

    def finish(self, wire: Wire) -> None:
        """Hear to the end what the other end has said before it went, and close the wire."""
        with self._receiving:
            self._wire = None
            self._heard(list(wire.messages()))
        if not self._on_loop(self._close, wire):
            wire.close()

    def _attend(self) -> None:
        assert self._loop is not None
        if self._wire is not None:
            self._loop.add_reader(self._wire.fileno(), self._receive, self._wire)

    def _receive(self, wire: Wire) -> None:
        with self._receiving:
            if wire is self._wire:
                self._heard(wire.receive())
            done = wire is not self._wire or wire.ended
        if done:
            self._forget(wire)

    def _close(self, wire: Wire) -> None:
        self._forget(wire)  # first, as another file may get its number
        wire.close()

    def _forget(self, wire: Wire) -> None:
        assert self._loop is not None
        self._loop.remove_reader(wire.fileno())

    def _on_loop(self, what: Callable[..., None], *arguments: object) -> bool:
        """Whether there is a loop to do it."""
        loop = self._loop
        if loop is None:
            return False
        with contextlib.suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(what, *arguments)
            return True
        return False
