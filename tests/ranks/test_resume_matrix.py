"""Any layout to any layout: eight layouts save one state, and load what the others saved of it.

The state is that of one process after two steps. Every rank compares what it loaded with the undivided tensors, bit for
bit, and takes the next step. `test_resume_layouts.py` goes on from states that a layout has trained by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from muster.parallel.catalogue import world_of
from muster.train.verify import Case
from tests.ranks.test_resume_layouts import DENSE, SAVED_AFTER, SHARED, _on_rank, make

Layout = dict[str, Any]
LAYOUTS: dict[str, list[Layout]] = {
    "dense": [
        {},
        {"shard": 2, "zero": 1},
        {"replicate": 2, "shard": 2, "zero": 3},
        {"tensor": 2},
        {"pipeline": 2, "schedule": "interleaved"},
        {"tensor": 2, "pipeline": 2, "schedule": "zbv"},
        {"context": 2, "context_kind": "ring", "shard": 2, "zero": 2},
        {"context": 2, "context_kind": "ulysses", "pipeline": 2, "schedule": "gpipe"},
    ],
    "experts": [
        {},
        {"shard": 2, "zero": 3, "expert": 2},
        {"replicate": 2, "offload": "cpu"},
        {"tensor": 2, "sequence_parallel": False},
        {"shard": 2, "expert": 2, "tensor": 2},
        {"context": 2, "expert": 2},
        {"context": 2, "shard": 2, "expert": 4},
        {"shard": 2, "expert": 2, "pipeline": 2, "schedule": "zbv"},
    ],
}
MODELS = {"dense": DENSE, "experts": SHARED}


# Each layout loads what those so many places further on have saved: some of each row and column, or all.
SOME, ALL = (1, 3), range(8)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("further", [SOME, pytest.param(ALL, marks=pytest.mark.long)], ids=["some", "all"])
def test_layouts_load_what_others_saved(
    kind: str, further: Sequence[int], run_ranks: Any, tmp_path: Path
) -> None:
    layouts = LAYOUTS[kind]
    cases = [make(MODELS[kind], "adamw", layout) for layout in layouts]
    expected = run_ranks(1, train_alone, cases[0], tmp_path)[0]
    undivided = assembled(tmp_path / "undivided")
    for number, layout in enumerate(layouts):
        run_ranks(world_of(layout), save_on, cases[number], tmp_path, f"saved-{number}")
        saved = assembled(tmp_path / f"saved-{number}")
        assert saved.keys() == undivided.keys()
        assert all(torch.equal(saved[name], undivided[name]) for name in undivided), layout
    for number, layout in enumerate(layouts):
        names = [f"saved-{(number + places) % len(layouts)}" for places in further]
        ranks = run_ranks(world_of(layout), load_on, cases[number], tmp_path, names)
        assert set().union(*(held for held, _ in ranks)) == undivided.keys()
        assert ranks[0][1] == pytest.approx([expected] * len(names), rel=1e-6, abs=0), layout


def train_alone(made: Case, folder: Path) -> float:
    """The only rank: leave the state after two steps; the loss of the third."""

    def work(trainee: Any, update: Callable[[int], float], save: Callable[[str], None]) -> float:
        for step in range(SAVED_AFTER):
            update(step)
        save("undivided")
        return update(SAVED_AFTER)

    return _on_rank(made, folder, work)  # type: ignore[arg-type, return-value]


def save_on(made: Case, folder: Path, name: str) -> None:
    def work(trainee: Any, update: Callable[[int], float], save: Callable[[str], None]) -> None:
        trainee.restore(folder / "undivided", SAVED_AFTER)
        save(name)

    _on_rank(made, folder, work)  # type: ignore[arg-type]


def load_on(made: Case, folder: Path, names: list[str]) -> tuple[set[str], list[float]]:
    """One rank: load each save and take a step. The tensors that it has a part of, and the losses."""
    undivided = assembled(folder / "undivided")

    def work(trainee: Any, update: Callable[[int], float], save: Callable[[str], None]) -> Any:
        losses = []
        for name in names:
            trainee.restore(folder / name, SAVED_AFTER)
            for tensor_name, tensor in trainee.state().items():
                assert_part(tensor, undivided[tensor_name], f"{tensor_name} of {name}")
            losses.append(update(SAVED_AFTER))
        return set(trainee.state()), losses

    return _on_rank(made, folder, work)  # type: ignore[return-value]


def assert_part(tensor: Tensor, whole: Tensor, which: str) -> None:
    """A rank's shard is the part of the whole that it says it is."""
    if not isinstance(tensor, DTensor):
        assert torch.equal(tensor, whole), which
        return
    assert tensor.shape == whole.shape, which
    for chunk in tensor.__create_chunk_list__():  # type: ignore[no-untyped-call]
        part = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
        assert torch.equal(tensor.to_local(), whole[part]), which


def assembled(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint put together by what its files' headers say, every element written once."""
    pieces: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            offsets = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                pieces.setdefault(name, []).append((offsets[name]["saved_offsets"], file.get_tensor(name)))
    found = {}
    for name, parts in pieces.items():
        shape = [max(at[dim] + part.shape[dim] for at, part in parts) for dim in range(parts[0][1].dim())]
        whole = torch.full(shape, torch.nan)
        assert sum(part.numel() for _, part in parts) == whole.numel(), name
        for at, part in parts:
            whole[tuple(slice(o, o + size) for o, size in zip(at, part.shape, strict=True))] = part
        assert not whole.isnan().any(), name
        found[name] = whole
    return found
