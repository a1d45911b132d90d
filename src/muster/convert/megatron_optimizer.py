"""The fp32 weights and the moments that Megatron-LM's plain optimizer keeps, by the names of its parameters.

Its state is numbered: group by group, and within a group in the order of the model. A group holds the vectors, which do
not decay, or the matrices, or both; the shapes tell which.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from muster.convert.source import Kind
from muster.convert.torchfile import StoredTensor

Chunk = dict[str, StoredTensor]
Names = list[tuple[int, str]]
"""Parameters: the chunk of the model, and the name there."""


class MissingMoments(Exception):
    """Why there are no moments."""


def moments_of(optimizer: Any, chunks: Sequence[Chunk]) -> tuple[dict[Kind, list[Chunk]], int | None]:
    """For each kind of tensor one table a chunk of the model, and the updates done where they are said."""
    if not isinstance(optimizer, dict):
        raise MissingMoments("it was saved without its optimizer")
    inner = optimizer.get("optimizer", optimizer)
    if not isinstance(inner, dict) or not isinstance(inner.get("state"), dict) or not inner["state"]:
        raise MissingMoments(
            "its optimizer was Megatron-LM's distributed one, whose state cannot be read here"
        )
    state, groups = inner["state"], inner.get("param_groups")
    masters = optimizer.get("fp32_from_fp16_params", optimizer.get("fp32_from_float16_params"))
    kinds: dict[Kind, list[Chunk]] = {
        kind: [{} for _ in chunks] for kind in ("weights", "exp_avg", "exp_avg_sq")
    }
    try:
        remaining: Names = [(index, name) for index, chunk in enumerate(chunks) for name in chunk]
        for number, group in enumerate(groups or []):
            held = [state[index] for index in group["params"]]
            members = _members(remaining, chunks, [entry["exp_avg"].shape for entry in held])
            remaining = [entry for entry in remaining if entry not in set(members)]
            for position, (chunk, name) in enumerate(members):
                kinds["exp_avg"][chunk][name] = held[position]["exp_avg"]
                kinds["exp_avg_sq"][chunk][name] = held[position]["exp_avg_sq"]
                if masters is not None:
                    kinds["weights"][chunk][name] = _shaped(masters[number][position], chunks[chunk][name])
        if remaining:
            raise MissingMoments(f"its optimizer has no state of {remaining[0][1]}")
        return kinds, _steps(groups or [], state)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise MissingMoments(
            f"its optimizer's state is in no form that is known here ({type(error).__name__}: {error})"
        ) from None


def _members(names: Names, chunks: Sequence[Chunk], shapes: list[tuple[int, ...]]) -> Names:
    for candidate in _candidates(names, chunks):
        if [chunks[chunk][name].shape for chunk, name in candidate] == shapes:
            return candidate
    raise MissingMoments("its optimizer's groups of parameters are not those of vectors and matrices")


def _candidates(names: Names, chunks: Sequence[Chunk]) -> Iterator[Names]:
    yield names
    yield [(chunk, name) for chunk, name in names if len(chunks[chunk][name].shape) > 1]
    yield [(chunk, name) for chunk, name in names if len(chunks[chunk][name].shape) == 1]


def _shaped(master: StoredTensor, weight: StoredTensor) -> StoredTensor:
    if master.shape != weight.shape:
        raise ValueError(f"fp32 weights of shape {master.shape} for {weight.shape}")
    return master


def _steps(groups: list[Any], state: dict[Any, Any]) -> int | None:
    said = groups[0].get("step") if groups else None
    said = next(iter(state.values())).get("step") if said is None else said
    return None if said is None else int(said.read() if isinstance(said, StoredTensor) else said)
