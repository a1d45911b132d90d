"""How long work is reported while it runs. The room prints nothing: whoever calls it shows what it likes."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one piece of work after another, from one thread at a time."""

    def start(self, total_bytes: int, what: str) -> None:
        """Work on `total_bytes` of text begins; `what` names it, e.g. "tokenising"."""

    def advance(self, size_bytes: int) -> None:
        """That many more bytes are done."""

    def done(self) -> None:
        """The work that was started last has ended, well or badly."""


class Silent:
    """Progress that nobody watches."""

    def start(self, total_bytes: int, what: str) -> None:
        pass

    def advance(self, size_bytes: int) -> None:
        pass

    def done(self) -> None:
        pass
