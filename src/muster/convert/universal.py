"""DeepSpeed's universal checkpoints: a folder for each parameter, with a file for its weights and each moment."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

from torch import Tensor

from muster.convert.source import Kind
from muster.convert.torchfile import StoredTensor, read_torch_file
from muster.errors import CheckpointError

_THEIRS: Mapping[Kind, str] = {"weights": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


class Universal:
    """A folder for each parameter."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes` of the parameters, which stage 3 leaves out."""
        self._folder, self._shapes = folder, shapes
        self._names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        step = folder / self._names[0] / "step.pt" if self._names else None
        self.step = read_torch_file(step) if step is not None and step.is_file() else None

    def names(self, kind: Kind) -> list[str]:
        return [name for name in self._names if self._path(kind, name).is_file()]

    def read(self, kind: Kind, name: str) -> Tensor:
        path = self._path(kind, name)
        content = read_torch_file(path)
        stored = content.get("param") if isinstance(content, dict) else content
        if not isinstance(stored, StoredTensor):
            raise CheckpointError(f"{path} holds no parameter: make the universal checkpoint again")
        shape = self._shapes.get(name, stored.shape)
        if prod(shape) != stored.numel:
            raise CheckpointError(
                f"{path} has {stored.numel} elements, but the model's file says {shape}: it is of another checkpoint"
            )
        return stored.read().view(shape)

    def _path(self, kind: Kind, name: str) -> Path:
        return self._folder / name / f"{_THEIRS[kind]}.pt"
