"""Metrics to TensorBoard and Weights & Biases, behind one small protocol; both are optional extras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from muster.errors import MissingExtra


class Tracker(Protocol):
    def log(self, step: int, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("track: [tensorboard]", "track") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, step: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


class WeightsAndBiases:
    def __init__(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("track: [wandb]", "track") from None
        # The same id for the same run: a resumed run continues its curves.
        self._run = wandb.init(project="muster", name=name, id=name, resume="allow", dir=str(folder), config=config)

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log(dict(record), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(names: Sequence[str], folder: Path, run_name: str, config: dict[str, Any]) -> list[Tracker]:
    """The trackers that a run file's `track:` names."""
    makers = {"tensorboard": lambda: TensorBoard(folder), "wandb": lambda: WeightsAndBiases(folder, run_name, config)}
    return [makers[name]() for name in names]
