"""Progress on the terminal: one calm line a log step, and a bar where there is somebody to watch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from muster.observe.format import count, duration, size
from muster.observe.room import or_not_at_all

_FIGURES: dict[str, Callable[[float], str]] = {
    "loss": "loss {:.4f}".format,
    "gradient_norm": "grad {:.2f}".format,
    "learning_rate": "lr {:.1e}".format,
    "held_out_loss": "held-out loss {:.4f}".format,
    "held_out_bits_per_byte": "{:.4f} bits per byte".format,
    "tokens_per_s": lambda rate: f"{count(rate)} tok/s",
    "expert_imbalance": "busiest expert {:.2f}x".format,
    "mfu": "MFU {:.0%}".format,
    "memory_bytes": size,
    "eta_s": lambda seconds: f"eta {duration(seconds)}",
}
"""Records by name, in the order in which a line shows them; others are for machines only."""


def step_line(step: int, steps: int, record: Mapping[str, float]) -> str:
    """`step  120/2000  loss 2.3140  grad 0.41  lr 2.9e-03  18.3k tok/s  MFU 42%  1.2 GB  eta 14m00s`"""
    figures = [write(record[name]) for name, write in _FIGURES.items() if name in record]
    return "  ".join([f"step {step:>{len(str(steps))}}/{steps}", *figures])


class RunProgress:
    """The lines of a run and, on a terminal, a bar below them."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("training", total=steps)
            self._bar.start()

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self.note(step_line(step, self._steps, record))
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def note(self, sentence: str) -> None:
        """A line of its own."""
        with or_not_at_all():
            self._console.print(sentence, markup=False)
            self._console.file.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ByteProgress:
    """The data room's progress: a bar on a terminal, else one line at the start of each piece of work."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    def start(self, total_bytes: int, what: str) -> None:
        self.done()
        if not self._console.is_terminal:
            self._console.print(f"{what}: {size(total_bytes)}", markup=False)
            self._console.file.flush()
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(what, total=total_bytes)
        self._bar.start()

    def advance(self, size_bytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, size_bytes)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
