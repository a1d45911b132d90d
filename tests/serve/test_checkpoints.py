"""Checkpoints are served as they lie, of any layout, and newer ones are taken up while requests go on."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from muster.checkpoint.shelf import folder_of, steps
from muster.errors import CheckpointError
from muster.export.trained import load_trained
from muster.serve.folders import find_source
from muster.serve.opening import open_model
from muster.serve.protocol import Engine, Request, SamplingParams, Token
from tests.conftest import RunRanks
from tests.serve.processes import Start, client, start
from tests.toy import tiny, train_here, write_corpus

__all__ = ["start"]

PROMPT = tuple(b"for i in")
SAVES = {"every": "2 steps", "keep": 9}
SPARSE = tiny()["model"] | {"family": "mixtral", "experts": 4, "experts_per_token": 2, "tied": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory, run_ranks: RunRanks) -> Path:
    """A run with checkpoints of steps 2, 4 and 6, sharded over two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_ranks(2, train_here, tiny(layout={"shard": 2, "zero": 3}, checkpoint=SAVES), str(corpus), str(folder))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "tiny"))


async def ask(engine: Engine, id: str, count: int = 12) -> list[Token]:
    params = SamplingParams(max_tokens=count, temperature=0.0, logprobs=0)
    return [token async for token in engine.submit(Request(id=id, prompt=PROMPT, params=params))]


async def said(engine: Engine, id: str) -> tuple[list[int], list[float]]:
    """What is drawn, and how likely it was: that tells apart models that say the same."""
    tokens = await ask(engine, id)
    return [token.id for token in tokens], [token.logprob or 0.0 for token in tokens]


async def fresh(folder: Path) -> tuple[list[int], Any]:
    """What a server that is started on a checkpoint says."""
    opened = await asyncio.to_thread(open_model, folder, dtype="fp32")
    with closing(opened.engine):
        ids, logprobs = await said(opened.engine, "fresh")
    return ids, pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param({"shard": 2, "zero": 3}, {}, id="zero 3"),
        pytest.param({"tensor": 2, "pipeline": 2}, {}, id="tensor and pipeline"),
        pytest.param({"tensor": 2, "pipeline": 2, "shard": 2}, {}, id="3d", marks=pytest.mark.long),
        pytest.param({"shard": 2, "expert": 2, "tensor": 2}, SPARSE, id="experts", marks=pytest.mark.long),
    ],
)
def test_any_layout_is_served_without_an_export(
    layout: dict[str, int], model: dict[str, Any], corpus: Path, tmp_path: Path, run_ranks: RunRanks
) -> None:
    ranks = layout.get("shard", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1)
    changes = {"model": model} if model else {}
    run_ranks(ranks, train_here, tiny(layout=layout, **changes), str(corpus), str(tmp_path / "run"))
    opened = open_model(tmp_path / "run", dtype="fp32")
    with closing(opened.engine):
        tokens = asyncio.run(ask(opened.engine, "a"))
    assert opened.engine.stats().weights_step == 6
    whole = load_trained(tmp_path / "run").model
    text = torch.tensor([[*PROMPT, *(token.id for token in tokens)]])
    with torch.inference_mode():
        expected = whole(text)[0, len(PROMPT) - 1 : -1].log_softmax(-1)  # (new tokens, V)
    assert [token.id for token in tokens] == expected.argmax(-1).tolist()
    best = pytest.approx(expected.amax(-1).tolist(), abs=1e-4)
    assert [token.logprob for token in tokens] == best


def test_the_export_is_served_where_it_is_as_new(run: Path) -> None:
    newest, export = folder_of(run / "checkpoints", 6), run / "hf"
    assert find_source(run).weights == newest
    assert find_source(run).step == 6
    shutil.copytree(run / "tokenizer", export)
    (export / "config.json").write_text("{}")
    for step, served in ((4, newest), (6, export)):
        (export / "muster.json").write_text(json.dumps({"provenance": {"step": step}}))
        assert find_source(run).weights == served
    older = find_source(folder_of(run / "checkpoints", 4))
    assert (older.step, older.run, older.tokenizer) == (4, run, run / "tokenizer")


def test_damaged_checkpoints_are_passed_over_and_named(run: Path) -> None:
    heard: list[str] = []
    flip(folder_of(run / "checkpoints", 6))
    assert find_source(run, heard.append).step == 4
    assert ["SHA-256" in sentence for sentence in heard] == [True]
    for step in (2, 4):
        flip(folder_of(run / "checkpoints", step))
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        find_source(run)
    shutil.copytree(run / "tokenizer", run / "hf")
    (run / "hf" / "config.json").write_text("{}")
    assert find_source(run, heard.append).weights == run / "hf"
    assert "older export is served" in heard[-1]


def flip(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_newer_checkpoints_are_taken_up_without_a_failed_request(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shelf, later = run / "checkpoints", tmp_path / "later"
    later.mkdir()
    for step in (4, 6):
        shutil.move(folder_of(shelf, step), later)
    opened = open_model(run, dtype="fp32", streams=3, own_process=True, follow=True)
    engine, answered, stop = opened.engine, 0, False

    async def keep_asking(name: str) -> None:
        nonlocal answered
        while not stop:
            assert len(await ask(engine, f"{name} {answered}", 20)) == 20
            answered += 1

    async def until(reached: Any) -> None:
        while not reached():
            await asyncio.sleep(0.01)

    async def follow() -> None:
        nonlocal stop
        clients = [asyncio.create_task(keep_asking(name)) for name in "abcde"]
        assert engine.stats().weights_step == 2
        assert await said(engine, "first") == await fresh(folder_of(shelf, 2))
        folder_of(later, 4).rename(folder_of(shelf, 4))
        await until(lambda: engine.stats().weights_step == 4)
        assert await said(engine, "second") == await fresh(folder_of(shelf, 4))
        shutil.copytree(folder_of(later, 6), folder_of(later, 5))
        flip(folder_of(later, 5))
        folder_of(later, 5).rename(folder_of(shelf, 5))
        heard = ""
        while "the checkpoint of step 5 is not served" not in heard:
            heard += capfd.readouterr().err
            await asyncio.sleep(0.01)
        assert engine.stats().weights_step == 4
        folder_of(later, 6).rename(folder_of(shelf, 6))
        await until(lambda: engine.stats().weights_step == 6)
        assert await said(engine, "third") == await fresh(folder_of(shelf, 6))
        stop = True
        await asyncio.gather(*clients)
        assert answered > 5
        assert (await said(engine, "last")) != await fresh(folder_of(shelf, 2))

    with closing(engine):
        asyncio.run(asyncio.wait_for(follow(), 120))
    assert steps(shelf) == [2, 4, 5, 6]


@pytest.mark.long
def test_a_server_on_two_ranks_follows_a_training(corpus: Path, tmp_path: Path, start: Start) -> None:
    """Over HTTP, while `muster train` writes checkpoints and deletes old ones: no request fails, versions rise, and
    in the end the server says what a new one says."""
    run_file = tmp_path / "tiny.yaml"
    changes = {
        "data": {"train": [{"files": f"{corpus}/*.py"}], "held_out": 0.1},
        "layout": {"shard": 2, "zero": 3},
        "checkpoint": {"every": "100 steps", "keep": 2},
        "serve": {"layout": {"tensor": 2}, "follow": True, "streams": 3},
    }
    train = tiny()["train"] | {"tokens": 10**6 * 256, "log_every": 100, "eval_every": None}
    run_file.write_text(json.dumps(tiny(**changes, train=train)))
    command = [sys.executable, "-m", "muster", "train", str(run_file), "--runs", str(tmp_path / "runs")]
    run = tmp_path / "runs" / "tiny"
    with (tmp_path / "train.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as job:
        try:
            wait_for(lambda: steps(run / "checkpoints"))
            with start(run, "--dtype", "fp32") as running, client(running) as ask:
                answers, versions, last = 0, [], -1
                while len(versions) < 5 or job.poll() is None or versions[-1] != last:
                    ask.completions.create(model="tiny", prompt=list(PROMPT), max_tokens=20)
                    answers += 1
                    version = ask.models.list().data[0].step  # type: ignore[attr-defined]
                    if not versions or versions[-1] != version:
                        versions.append(version)
                    if len(versions) == 5 and job.poll() is None:
                        job.send_signal(signal.SIGTERM)
                        assert job.wait(timeout=60) == 75
                        last = steps(run / "checkpoints")[-1]
                assert versions == sorted(versions)
                assert answers > 20
                made = ask.completions.create(
                    model="tiny", prompt=list(PROMPT), temperature=0, max_tokens=12, logprobs=0
                )
        finally:
            job.kill()
    ids, logprobs = asyncio.run(fresh(folder_of(run / "checkpoints", last)))
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.token_logprobs == logprobs
    assert len(ids) == 12


def wait_for(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
