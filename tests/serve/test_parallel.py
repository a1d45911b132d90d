"""Servers whose model is divided over ranks: real processes, killed and stopped."""

from __future__ import annotations

import contextlib
import shutil
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from muster.errors import ConfigError
from muster.model.folder import load_folder
from muster.serve.codec import TextCodec
from muster.serve.opening import open_model
from tests.serve.processes import Start, client, start

__all__ = ["start"]


def greedy(model: str, max_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": "ab", "temperature": 0, "max_tokens": max_tokens}


def expected(folder: Path, reference: Any, max_tokens: int) -> str:
    codec = TextCodec.from_folder(folder)
    return codec.decode(reference(load_folder(folder), codec.encode("ab"), max_tokens))


def test_a_rank_that_is_killed_ends_the_server_with_its_name(
    folder: Path, start: Start, reference: Any
) -> None:
    with start(folder, "--tensor", 2, "--dtype", "fp32") as running, client(running) as ask:
        assert running.said[0] == "layout  tensor 2 x pipeline 1: 2 ranks\n"
        answer = ask.completions.create(**greedy("small-run", 12)).choices[0].text
        assert answer == expected(folder / "hf", reference, 12)
        stream = ask.completions.create(**greedy("small-run", 90), stream=True)
        next(iter(stream))
        running.ranks()["rank-1"].kill()
        with contextlib.suppress(openai.APIError):  # or it had been answered by then
            for _ in stream:
                pass
        assert running.process.wait(timeout=30) == 1
        assert running.process.stderr is not None
        assert "rank 1 was killed by SIGKILL; its log is under" in running.process.stderr.read().decode()


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named(folder: Path, start: Start) -> None:
    with start(folder, "--tensor", 2, "--dtype", "fp32") as running, client(running) as ask:
        running.ranks()["rank-1"].suspend()
        with contextlib.suppress(openai.APIError):
            ask.completions.create(**greedy("small-run", 12))
        assert running.process.wait(timeout=30) == 1
        assert running.process.stderr is not None
        assert "rank 1 has been stopped (SIGSTOP) for 5 s" in running.process.stderr.read().decode()


@pytest.mark.long
def test_sigterm_ends_all_ranks(folder: Path, start: Start, reference: Any, tmp_path: Path) -> None:
    with start(folder, "--pipeline", 2, "--dtype", "fp32") as running, client(running) as ask:
        answer = ask.completions.create(**greedy("small-run", 12)).choices[0].text
        assert answer == expected(folder / "hf", reference, 12)
        (rank,) = running.ranks().values()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=30) == 0
        assert running.process.stderr is not None
        assert running.process.stderr.read() == b""
        rank.wait(timeout=20)
        left = {path.name for path in (tmp_path / "temporary").iterdir()}
        assert not {name for name in left if not name.startswith("torchinductor")}  # a cache that torch keeps


def test_what_cannot_be_divided_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.layout\.tensor: 3 does not divide heads \(4\): .* 2 or 4"):
        open_model(folder, own_process=True, tensor=3)
    with pytest.raises(ConfigError, match=r"serve\.layout\.pipeline: 3 pipeline stages .* the model has 2"):
        open_model(folder, own_process=True, pipeline=3)
    with pytest.raises(ConfigError, match=r"serve\.follow: .* is not of a run"):
        open_model(Path(shutil.copytree(folder / "hf", tmp_path / "model")), own_process=True, follow=True)
