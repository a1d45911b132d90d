"""Megatron-LM's checkpoints in its `torch` format: a file for each tensor- and pipeline-parallel rank.

    iter_0000100/mp_rank_00/model_optim_rng.pt        tensor-parallel rank 0
    iter_0000100/mp_rank_00_001/model_optim_rng.pt    ... of pipeline stage 1, where there are several

The moments are those of its plain optimizer. Its distributed optimizer's (`distrib_optim.pt`) lie in buffers whose
layout the files do not tell; then there are weights only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muster.convert.megatron_args import spec_of_arguments
from muster.convert.megatron_names import layers_of, shifted, stored_tensors, theirs
from muster.convert.megatron_optimizer import MissingMoments, moments_of
from muster.convert.source import Kind, table, understood, whole_number
from muster.convert.torchfile import StoredTensor, read_torch_file
from muster.errors import CheckpointError, UsageError
from muster.model.spec import TransformerSpec
from muster.model.transformer import Value

_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(_\d{3})?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_TRACKER = "latest_checkpointed_iteration.txt"

Parts = Mapping[str, Sequence[StoredTensor]]
"""Tensors of the whole model by Megatron's names: each tensor-parallel rank's part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Megatron:
    folder: Path
    label: str
    steps: int
    spec: TransformerSpec | None
    missing_moments: str | None
    _parts: Mapping[Kind, Parts]

    def values(self, kind: Kind, spec: TransformerSpec) -> Value:
        if kind not in self._parts:
            raise UsageError(f"{self.folder} has no moments: {self.missing_moments}")
        places, parts = theirs(spec), self._parts[kind]
        needed = {place.name for place in places.values()}
        if spec.tied:
            needed.add(
                "output_layer.weight"
            )  # where stages are apart, the last one has a copy of the embedding
        if surplus := sorted(parts.keys() - needed):
            raise UsageError(
                f"{self.folder} has the tensor '{surplus[0]}', which a {spec.family} model has not"
            )

        def value(name: str, shape: torch.Size) -> Tensor:
            place = places[name]
            if place.name not in parts:
                raise UsageError(f"{self.folder} lacks the tensor '{place.name}', which {name} is made of")
            with understood(f"{self.folder}: {place.name}"):
                tensor = place.join([part.read() for part in parts[place.name]])
            if tensor.shape != shape:
                raise UsageError(
                    f"{self.folder}: '{place.name}' gives {name} the shape {tuple(tensor.shape)} instead of "
                    f"{tuple(shape)}: the checkpoint is of another model"
                )
            return tensor.float().contiguous()

        return value


def folder_of(path: Path) -> Path | None:
    """The folder of a checkpoint's ranks: `path`, or what its tracker names; None if it is none of Megatron's."""
    tracker = path / _TRACKER
    if tracker.is_file():
        said = tracker.read_text("utf-8", errors="replace").strip()
        name = f"iter_{int(said):07d}" if said.isascii() and said.isdigit() else said
        if Path(name).name != name or not (path / name).is_dir():
            raise CheckpointError(f"{tracker} names '{said[:80]}', which is not in the folder: copy it again")
        path = path / name
        if folder_of(path) is None:
            raise CheckpointError(
                f"{path} is in Megatron-LM's distributed format (torch_dist or another): write it with "
                f"--ckpt-convert-format torch first"
            )
    return path if path.is_dir() and any(_is_rank(entry) for entry in path.iterdir()) else None


def open_megatron(folder: Path) -> Megatron:
    """The checkpoint in `folder`, such as iter_0000100; its tensors are not read yet."""
    ranks = _ranks(folder)
    contents = {place: table(read_torch_file(path), path) for place, path in ranks.items()}
    first_path, first = ranks[0, 0], contents[0, 0]
    arguments = first.get("args")
    if not isinstance(arguments, dict):
        raise CheckpointError(
            f"{first_path} has no args, which say what its model is: use a newer Megatron-LM's"
        )
    version = first.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2:
        raise CheckpointError(
            f"{first_path} is of checkpoint_version {version}, which orders queries, keys and values in another way: "
            f"load and save it with a newer Megatron-LM"
        )
    stages = 1 + max(stage for _, stage in ranks)
    tensor_ranks = 1 + max(rank for rank, _ in ranks)
    models = {place: _chunks(content, ranks[place]) for place, content in contents.items()}
    offsets = _offsets([models[0, stage] for stage in range(stages)])
    weights: dict[str, list[StoredTensor]] = {}
    optimizer: dict[Kind, dict[str, list[StoredTensor]]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    missing, steps = None, whole_number(first, "iteration", first_path)
    for (rank, stage), chunks in sorted(models.items()):
        _collect(weights, chunks, offsets[stage], rank)
        if missing is None:
            try:
                moments, done = moments_of(contents[rank, stage].get("optimizer"), chunks)
            except MissingMoments as reason:
                missing = str(reason)
                continue
            steps = steps if done is None else done
            for kind, of_chunks in moments.items():
                _collect(optimizer[kind], of_chunks, offsets[stage], rank)
    # The optimizer's fp32 weights are the ones that were trained; the model's may be rounded copies of them.
    parts: dict[Kind, Parts] = {"weights": weights}
    if missing is None:
        parts = {**optimizer, "weights": weights | optimizer["weights"]}
    return Megatron(
        folder=folder,
        label=f"Megatron-LM checkpoint {folder.name} of {tensor_ranks} x {stages} ranks (tensor x pipeline)",
        steps=steps,
        spec=spec_of_arguments(arguments),
        missing_moments=missing,
        _parts=parts,
    )


def _ranks(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of each tensor-parallel rank and pipeline stage."""
    found: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        match = _RANK.fullmatch(entry.name)
        if match is None or not _is_rank(entry):
            continue
        if match[3] is not None:
            raise CheckpointError(
                f"{entry} is of expert-parallel ranks: models with experts cannot be converted"
            )
        found[int(match[1]), int(match[2] or 0)] = next(
            entry / name for name in _FILES if (entry / name).is_file()
        )
    ranks, stages = (1 + max(place[axis] for place in found) for axis in (0, 1))
    for place in ((rank, stage) for rank in range(ranks) for stage in range(stages)):
        if place not in found:
            raise CheckpointError(
                f"{folder} lacks the file of tensor-parallel rank {place[0]}, stage {place[1]}: copy it again"
            )
    return found


def _is_rank(entry: Path) -> bool:
    return _RANK.fullmatch(entry.name) is not None and any((entry / name).is_file() for name in _FILES)


def _chunks(content: dict[str, Any], path: Path) -> list[dict[str, StoredTensor]]:
    """The parts of the model on one rank: one, or with an interleaved schedule several."""
    keys = ["model"] if "model" in content else sorted(
        (key for key in content if re.fullmatch(r"model\d+", key)), key=lambda key: int(key[5:])
    )  # fmt: skip
    chunks = [stored_tensors(table(content[key], path)) for key in keys]
    if not any(chunks):
        raise CheckpointError(f"{path} holds no tensors of a model: copy the checkpoint again")
    return chunks


def _offsets(stages: list[list[dict[str, StoredTensor]]]) -> list[list[int]]:
    """How many layers come before each chunk of each stage: the first chunks of all stages come first."""
    offsets = [[0] * len(chunks) for chunks in stages]
    before = 0
    for chunk in range(max(map(len, stages))):
        for stage, chunks in enumerate(stages):
            if chunk < len(chunks):
                offsets[stage][chunk] = before
                before += layers_of(chunks[chunk])
    return offsets


def _collect(
    into: dict[str, list[StoredTensor]],
    chunks: Sequence[Mapping[str, StoredTensor]],
    offsets: list[int],
    rank: int,
) -> None:
    for chunk, offset in zip(chunks, offsets, strict=True):
        for name, tensor in chunk.items():
            parts = into.setdefault(shifted(name, offset), [])
            if len(parts) != rank:
                raise CheckpointError(
                    f"the tensor-parallel ranks do not hold the same tensors ({name}): copy the checkpoint again"
                )
            parts.append(tensor)
