"""Progress on the terminal: one calm line a log step, a bar where there is somebody to watch it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from muster.observe.format import count, duration, size


def step_line(step: int, steps: int, record: Mapping[str, float]) -> str:
    """`step  120/2000  loss 2.314  grad 0.41  lr 2.9e-03  18.3k tok/s  MFU 42%  1.2 GB  eta 14m00s`"""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    if "held_out_loss" in record:
        parts += [f"held-out loss {record['held_out_loss']:.4f}", f"{record['held_out_bits_per_byte']:.4f} bits per byte"]
    else:
        parts += [
            f"loss {record['loss']:.4f}",
            f"grad {record['gradient_norm']:.2f}",
            f"lr {record['learning_rate']:.1e}",
            f"{count(record['tokens_per_s'])} tok/s",
            f"MFU {record['mfu']:.0%}",
            size(record["memory_bytes"]),
            f"eta {duration(record['eta_s'])}",
        ]
    return "  ".join(parts)


class RunProgress:
    """The lines of a run and, on a terminal, a bar below them."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self._console, transient=True
            )
            self._task = self._bar.add_task("training", total=steps)
            self._bar.start()

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self.note(step_line(step, self._steps, record))
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def note(self, sentence: str) -> None:
        """A line of its own."""
        self._console.print(sentence, markup=False)
        sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class ByteProgress:
    """The data room's progress on the terminal: a bar, or one line at the start of each piece of work."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._bar: Progress | None = None

    def start(self, total_bytes: int, what: str) -> None:
        self.done()
        if not self._console.is_terminal:
            self._console.print(f"{what}: {size(total_bytes)}", markup=False)
            return
        self._bar = Progress(
            TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=self._console, transient=True
        )
        self._task = self._bar.add_task(what, total=total_bytes)
        self._bar.start()

    def advance(self, done_bytes: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, done_bytes)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
