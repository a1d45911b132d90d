"""How a process that keeps ranks running hears that it should stop: the signals that a rank hears, too."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from muster.resilience.lifeline import STOP_SIGNALS


class Asked:
    """What has been asked of this process by STOP_SIGNALS, while it `listens`."""

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the signal; None while nobody has asked."""
        self.at_once = False
        """Whether that is to be without a checkpoint: by a second SIGINT."""

    @contextlib.contextmanager
    def listens(self) -> Iterator[None]:
        """Hear signals within; the main thread only."""
        before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.at_once = number == signal.SIGINT and self.signal == "SIGINT"
        self.signal = signal.Signals(number).name
