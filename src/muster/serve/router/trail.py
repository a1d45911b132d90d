"""One streamed answer on its way to the client: passes events on as they are, and remembers what they delivered.

Of an event nothing is parsed but the mark in front of it (see `serve/relay.py`), which is taken off.
"""

from __future__ import annotations

from typing import Any

from muster.serve.relay import LOST, MARK, read_mark

_END = b"\n\n"
_DONE = b"data: [DONE]"


class Trail:
    """A stream that may be cut and go on elsewhere. `id` and `created` are those of the answer."""

    def __init__(self, id: str, created: int) -> None:
        self._id, self._created = id, created
        self._rest = b""
        """The beginning of an event."""
        self._choices: dict[int, dict[str, Any]] = {}
        self._unmarked = b""
        """What says nothing of itself waits for the stream's end: it would come again after a cut."""
        self.lost = False
        """The replica has given this answer up."""
        self.new_tokens = 0
        """Tokens in what was passed on last."""

    @property
    def relay(self) -> dict[str, Any]:
        """The body's field, so that a stream begins where this one is."""
        return {"id": self._id, "created": self._created, "choices": list(self._choices.values())}

    def feed(self, data: bytes) -> bytes:
        """Add bytes of the stream; returns what can be passed on."""
        *events, self._rest = (self._rest + data).split(_END)
        self.new_tokens = 0
        return b"".join([self._passed(event) for event in events])

    def end(self) -> bytes:
        """The stream has come to its proper end: what was held back."""
        return self._unmarked + self._rest

    def restart(self) -> None:
        """The stream was cut; another begins where it was."""
        self._rest = self._unmarked = b""
        self.lost = False

    def _passed(self, event: bytes) -> bytes:
        if event.startswith(MARK):
            line, _, event = event.partition(b"\n")
            self._note(line)
            return event + _END
        if event.startswith(_DONE):
            passed, self._unmarked = self._unmarked + event + _END, b""
            return passed
        if event.startswith(LOST):
            self.lost = True
            _, _, event = event.partition(b"\n")
        self._unmarked += event + _END
        return b""

    def _note(self, line: bytes) -> None:
        said = read_mark(line)
        self.new_tokens += len(said.ids)
        choice = self._choices.setdefault(said.index, {"index": said.index, "ids": []})
        choice["ids"] += said.ids
        choice |= {"characters": said.characters, "generated": said.generated, "finished": said.finished}
