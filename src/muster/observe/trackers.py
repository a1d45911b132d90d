"""Metrics to TensorBoard and Weights & Biases, behind one small protocol; both are optional extras.

W&B's own settings rule (`WANDB_MODE=offline` keeps everything on disk).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from muster.errors import MissingExtra


class Tracker(Protocol):
    """Where else figures go."""

    def log(self, step: int, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder's `tensorboard/`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils import tensorboard
        except ImportError:
            raise MissingExtra("track: [tensorboard]", "track") from None
        untyped: Any = tensorboard
        self._writer = untyped.SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `muster` in W&B."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("track: [wandb]", "track") from None
        # The same id for the same run: a resumed run continues its curves.
        self._run = wandb.init(
            project="muster", name=name, id=name, resume="allow", dir=str(folder), config=config
        )

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log(dict(record), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Sequence[str], folder: Path, run_name: str, config: dict[str, Any]) -> list[Tracker]:
    """The trackers that a run file's `track:` names; MissingExtra where one is not installed."""
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder),
        "wandb": lambda: WeightsAndBiases(folder, run_name, config),
    }
    return [makers[name]() for name in names]
