"""Fixtures for every test. `run_ranks` makes a multi-rank test cost tenths of a second: one forkserver with
torch preloaded for the session, fresh processes forked from it for each test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from muster.cli import main
from muster.resilience.forked import PRELOADED, free_port

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

_DEADLINE_S = 120.0

RunRanks = Callable[..., list[Any]]
Muster = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """`run_ranks(n, function, *args)` calls `function(*args)` on n fresh gloo ranks and returns their results.

    The function must be importable; each rank finds RANK and WORLD_SIZE in its environment and joins
    with `muster.parallel.world.join`. The first rank's traceback is the test's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "tests.toy", *PRELOADED])

    def run(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        port = free_port()
        pipes, processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, ranks, port, there, function, args), daemon=True
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return [_result(pipe, rank) for rank, pipe in enumerate(pipes)]
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()

    return run


def _result(pipe: Connection, rank: int) -> Any:
    if not pipe.poll(_DEADLINE_S):
        raise TimeoutError(f"rank {rank} did not answer within {_DEADLINE_S:.0f} s")
    try:
        ok, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if not ok:
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value


def _rank(
    rank: int, ranks: int, port: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    try:
        answer = (True, function(*args))
        pickle.dumps(answer)
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()


@pytest.fixture
def muster(capsys: pytest.CaptureFixture[str]) -> Muster:
    """`muster(*arguments)` runs the command in this process: (exit code, stdout, stderr)."""

    def muster(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return int(str(ended.value.code)), said.out, said.err

    return muster
