"""DeepSpeed's checkpoints, of ZeRO stages 1 to 3 (`zero.py`) and universal ones (`universal.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from muster.convert.source import Kind, table, understood, whole_number
from muster.convert.torchfile import StoredTensor, read_torch_file
from muster.convert.universal import Universal
from muster.convert.zero import open_partitioned
from muster.errors import CheckpointError
from muster.model.folder import values_from
from muster.model.spec import TransformerSpec
from muster.model.transformer import Value

_RANK = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")


class Tensors(Protocol):
    """Where a layout of files keeps each parameter."""

    step: Any
    """Updates done, where the optimizer's files say so."""

    def names(self, kind: Kind) -> list[str]: ...
    def read(self, kind: Kind, name: str) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeed:
    """A checkpoint of DeepSpeed, by the names that its model gives its parameters."""

    folder: Path
    label: str
    steps: int
    spec: TransformerSpec | None
    """Never said: DeepSpeed does not know the model that it trains."""
    missing_moments: str | None
    _tensors: Tensors
    _aliases: Mapping[str, str]
    """Of a tensor that has several names, the other ones and the one that it is kept under."""

    def values(self, kind: Kind, spec: TransformerSpec) -> Value:
        kept = self._tensors.names(kind)
        aliases = {other: name for other, name in self._aliases.items() if name in kept}
        return values_from(
            spec,
            {*kept, *aliases},
            lambda name: self._read(kind, aliases.get(name, name)),
            f"{self.folder} ({kind})",
        )

    def _read(self, kind: Kind, name: str) -> Tensor:
        with understood(self.folder):
            return self._tensors.read(kind, name)


def folder_of(path: Path) -> Path | None:
    """The folder of a checkpoint's files: `path`, or what its `latest` names; None if it is none of DeepSpeed."""
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text("utf-8", errors="replace").strip()
        if Path(tag).name != tag or not (path / tag).is_dir():
            raise CheckpointError(f"{latest} names '{tag[:80]}', which is not in the folder: copy it again")
        return folder_of(path / tag)
    is_one = path.is_dir() and any(_RANK.fullmatch(entry.name) for entry in path.iterdir())
    return path if is_one else None


def open_deepspeed(folder: Path) -> DeepSpeed:
    """The checkpoint in `folder`, such as global_step100; its tensors are not read yet."""
    files = {match: folder / match[0] for entry in folder.iterdir() if (match := _RANK.fullmatch(entry.name))}
    if model_parallel := max(int(match[2]) for match in files):
        raise CheckpointError(
            f"{folder} is of {model_parallel + 1} model-parallel ranks (mp_rank_{model_parallel:02d}), and DeepSpeed "
            f"does not say how they divide the model: make a universal checkpoint of it with ds_to_universal"
        )
    ordered = [files[match] for match in sorted(files, key=lambda match: int(match[1] or 0))]
    models = [table(read_torch_file(path), path) for path in ordered]
    first = models[0]
    steps = whole_number(first, "global_steps", ordered[0]) - int(first.get("skipped_steps") or 0)
    tensors: Tensors
    if (folder / "zero").is_dir():
        tensors, kind = Universal(folder / "zero", _shapes(first)), "universal"
    else:
        tensors, kind = open_partitioned(folder, models), "ZeRO"
    _same_steps(tensors, steps, folder)
    shared = first.get("shared_params") or {}
    return DeepSpeed(
        folder=folder,
        label=f"DeepSpeed {kind} checkpoint {folder.name}",
        steps=steps,
        spec=None,
        missing_moments=None if tensors.names("exp_avg") else "its optimizer files hold no moments of Adam",
        _tensors=tensors,
        _aliases={**{name: other for other, name in shared.items()}, **shared},
    )


def _shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    groups = model.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return {}
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _same_steps(tensors: Tensors, steps: int, folder: Path) -> None:
    said = float(tensors.step.read()) if isinstance(tensors.step, StoredTensor) else tensors.step
    if said is not None and said != steps:
        raise CheckpointError(
            f"{folder}: its model's file says {steps} updates, its optimizer's {said}: they are not of one checkpoint"
        )
