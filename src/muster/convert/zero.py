"""The flat vectors of ZeRO (Rajbhandari et al. 2020), as DeepSpeed's optimizer files hold them.

They are the fp32 weights and the moments, a part for each rank; which parameter lies where follows from the shapes
in the model's files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muster.convert.source import KINDS, Kind, table
from muster.convert.torchfile import StoredTensor, read_torch_file
from muster.errors import CheckpointError

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
Shapes = list[dict[str, tuple[int, ...]]]
"""Of the parameters of each group."""


@dataclass(frozen=True, slots=True)
class _Flat:
    """One long vector in pieces."""

    pieces: Sequence[StoredTensor]

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)

    def read(self, start: int, numel: int) -> Tensor:
        return torch.cat(list(self._parts(start, start + numel)))

    def _parts(self, start: int, stop: int) -> Iterator[Tensor]:
        begin = 0
        for piece in self.pieces:
            first, last = max(start - begin, 0), min(stop - begin, piece.numel)
            if first < last:
                yield piece.read()[first:last]
            begin += piece.numel


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter is: the same range of each of some vectors, one after the other."""

    vectors: Mapping[Kind, Sequence[_Flat]]
    start: int
    numel: int
    shape: tuple[int, ...]

    def read(self, kind: Kind) -> Tensor:
        whole = torch.cat([vector.read(self.start, self.numel) for vector in self.vectors[kind]])
        return whole[: prod(self.shape)].view(self.shape)  # what is over is padding


class Partitioned:
    """ZeRO's flat vectors."""

    def __init__(self, places: Mapping[str, _Place], whole: Mapping[str, StoredTensor], step: Any) -> None:
        self._places, self._whole, self.step = places, whole, step

    def names(self, kind: Kind) -> list[str]:
        held = [name for name, place in self._places.items() if kind in place.vectors]
        return [*held, *(self._whole if kind == "weights" else ())]

    def read(self, kind: Kind, name: str) -> Tensor:
        return self._whole[name].read() if name in self._whole else self._places[name].read(kind)


def open_partitioned(folder: Path, models: list[dict[str, Any]]) -> Partitioned:
    """The optimizer files in `folder`, which the contents of its model files belong to."""
    matches = (_OPTIMIZER.fullmatch(entry.name) for entry in folder.iterdir())
    found = {int(match[1]): folder / match[0] for match in matches if match}
    if not found:
        raise CheckpointError(
            f"{folder} has no optimizer files of ZeRO (zero_pp_rank_0_mp_rank_00_optim_states.pt): it is incomplete, "
            f"or of stage 0, whose model can be saved with save_16bit_model"
        )
    states = []
    for rank in range(len(found)):
        if rank not in found:
            raise CheckpointError(
                f"{folder} lacks the optimizer file of rank {rank} of {max(found) + 1}: copy it again"
            )
        states.append(
            table(table(read_torch_file(found[rank]), found[rank]).get("optimizer_state_dict"), found[rank])
        )
    count = states[0].get("partition_count")
    count = max(count) if isinstance(count, list) and count else count
    if count != len(states):
        raise CheckpointError(
            f"{folder} holds the optimizer files of {len(states)} ranks, but they say {count}: copy it again"
        )
    shapes = [{name: tuple(size) for name, size in group.items()} for group in models[0]["param_shapes"]]
    sharded = "fp32_flat_groups" in states[0]
    places, step = (_stage3 if sharded else _stage2)(shapes, states)
    whole = _frozen(models, sharded)
    return Partitioned(places, whole, step)


def _stage2(shapes: Shapes, states: list[dict[str, Any]]) -> tuple[dict[str, _Place], Any]:
    """Each group of parameters is one vector, of which each rank has an equal part."""
    places: dict[str, _Place] = {}
    step = None
    paddings = states[0].get("param_alignment_paddings")
    for group, members in enumerate(shapes):
        vectors: dict[Kind, list[_Flat]] = {
            "weights": [_Flat([state["single_partition_of_fp32_groups"][group] for state in states])]
        }
        moments = [state["base_optimizer_state"]["state"].get(group, {}) for state in states]
        step = moments[0].get("step", step)
        for kind in KINDS[1:]:
            if all(kind in held for held in moments):
                vectors[kind] = [_Flat([held[kind] for held in moments])]
        start = 0
        for index, (name, shape) in enumerate(members.items()):
            places[name] = _Place(vectors, start, prod(shape), shape)
            start += prod(shape) + (paddings[group][index] if paddings else 0)
        _check_length(vectors, start, 2 * len(states))
    return places, step


def _stage3(shapes: Shapes, states: list[dict[str, Any]]) -> tuple[dict[str, _Place], Any]:
    """Each parameter is divided over the ranks; a rank's parts are one vector, cut into sub-groups."""
    vectors: dict[Kind, list[_Flat]] = {"weights": [_Flat(state["fp32_flat_groups"]) for state in states]}
    moments = [state["optimizer_state_dict"]["state"] for state in states]
    for kind in KINDS[1:]:
        if all(kind in held for groups in moments for held in groups.values()) and moments[0]:
            vectors[kind] = [_Flat([groups[index][kind] for index in sorted(groups)]) for groups in moments]
    places: dict[str, _Place] = {}
    start = 0
    for name, shape in (entry for members in shapes for entry in members.items()):
        numel = -(-prod(shape) // len(states))
        places[name] = _Place(vectors, start, numel, shape)
        start += numel
    _check_length(vectors, start, 1)
    return places, next((held.get("step") for held in moments[0].values()), None)


def _check_length(vectors: Mapping[Kind, Sequence[_Flat]], used: int, alignment: int) -> None:
    for kind, flats in vectors.items():
        for flat in flats:
            if not used <= flat.numel < used + alignment * max(len(flat.pieces), 1) + alignment:
                raise ValueError(f"its {kind} have {flat.numel} elements where its parameters have {used}")


def _frozen(models: list[dict[str, Any]], sharded: bool) -> dict[str, StoredTensor]:
    """Parameters that were not trained, which no optimizer file holds."""
    shapes = models[0].get("frozen_param_shapes") or {}
    if shapes and sharded:
        raise ValueError("parameters that were not trained, in parts")
    held = models[0].get("frozen_param_fragments") or {}
    return {name: held[name] for name in shapes}
