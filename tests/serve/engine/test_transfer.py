"""Blocks that one core has computed, taken up by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from muster.serve.engine.batch import PagedCache
from muster.serve.engine.core import Core
from muster.serve.engine.network import TransformerNetwork
from muster.serve.engine.transfer import Porter
from muster.serve.protocol import EngineError, Request, SamplingParams

PROMPT = tuple(range(1, 61))
SIZE = 8


def pair(
    model: Any, identity: str = "a", blocks: int = 40, salt: str = ""
) -> tuple[Core, PagedCache, Porter]:
    network, _ = TransformerNetwork.of(model, "fp32")
    cache = network.new_cache(blocks, SIZE)
    core = Core(network, cache, streams=2, step_tokens=32, context_tokens=96, salt=salt)
    return core, cache, Porter(core, cache, identity)


def run(core: Core, prompt: tuple[int, ...] = PROMPT, name: str = "r") -> list[int]:
    core.add(Request(id=name, prompt=prompt, params=SamplingParams(max_tokens=12, temperature=0.0)))
    ids = []
    with torch.inference_mode():
        while core.busy:
            for _, item in core.step().items:
                assert not isinstance(item, EngineError), item
                ids.append(item.id)
    return ids


@pytest.fixture
def given(model: Any, tmp_path: Path) -> tuple[Path, list[int]]:
    core, _, porter = pair(model)
    said = run(core)
    path = tmp_path / "blocks"
    path.touch()
    assert porter.move(path, PROMPT) == len(PROMPT) // SIZE
    return path, said


def test_what_was_computed_elsewhere_is_found_and_changes_nothing(model: Any, given: Any) -> None:
    path, said = given
    core, _, porter = pair(model)
    run(core, PROMPT[:16], "first")  # two of the blocks are known already
    before = core.stats()
    assert porter.move(path, ()) == len(PROMPT) // SIZE
    assert core.pool.used == 0
    assert run(core) == said
    after = core.stats()
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == len(PROMPT) // SIZE * SIZE
    assert after.prompt_tokens - before.prompt_tokens == len(PROMPT) % SIZE
    assert porter.move(path, ()) == len(PROMPT) // SIZE  # once more is nothing new


def test_blocks_that_held_nan_are_wiped_before_others_are_put_there(model: Any, given: Any) -> None:
    path, said = given
    core, cache, porter = pair(model, blocks=13)
    taken = [core.pool.take() for _ in range(13)]
    for layer in (*cache.keys, *cache.values):
        layer.fill_(torch.nan)
    core.pool.release(taken, tainted=True)
    assert porter.move(path, ()) == len(PROMPT) // SIZE
    assert run(core) == said


@pytest.mark.parametrize(
    "wrong", ["identity", "damaged", "cut", "empty", "missing", "model", "weights' step"]
)
def test_what_does_not_fit_is_left_alone(model: Any, make_model: Any, given: Any, wrong: str) -> None:
    path, said = given
    content = path.read_bytes()
    if wrong == "damaged":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 64]) + content[-4:])
    elif wrong == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif wrong == "empty":
        path.write_bytes(b"")
    elif wrong == "missing":
        path.unlink()
    other = make_model(layers=3) if wrong == "model" else model
    core, _, porter = pair(
        other, "b" if wrong == "identity" else "a", salt="step 2" if wrong == "weights' step" else ""
    )
    moved = porter.move(path, ())
    found = run(core)
    assert core.stats().prefix_hit_tokens == 0
    if wrong == "weights' step":  # their keys begin with another root, so that nobody asks for them
        assert moved > 0
    else:
        assert moved == 0
    if other is model:
        assert found == said


def test_what_runs_keeps_its_room(model: Any, given: Any) -> None:
    path, _ = given
    core, _, porter = pair(model, blocks=13)
    core.add(Request(id="r", prompt=(1, 2, 3) * 20, params=SamplingParams(max_tokens=20, temperature=0.0)))
    with torch.inference_mode():
        core.step()
    used = core.pool.used
    assert porter.move(path, ()) == 0
    assert core.pool.used == used
    core.cancel("r")
    assert core.pool.used == 0


def test_nothing_is_left_where_nobody_waits(model: Any, tmp_path: Path) -> None:
    core, _, porter = pair(model)
    run(core)
    assert porter.move(tmp_path / "gone", PROMPT) == 0
    assert not list(tmp_path.iterdir())
