"""The engine's own process: real ones, killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from muster.errors import UsageError
from muster.model.folder import load_folder
from muster.serve.crossing import Outcome
from muster.serve.engine.cores import Apart, on_all_cores
from muster.serve.engine.ear import Ear
from muster.serve.engine.process import ProcessEngine
from muster.serve.engine.wire import Wire, from_outcome, from_request, to_items, to_request
from muster.serve.opening import Setup
from muster.serve.protocol import EngineError, Guide, Request, SamplingParams, Stats, Token


def setup_of(folder: Path) -> dict[str, Any]:
    return asdict(
        Setup(folder=str(folder / "hf"), dtype="fp32", streams=2, context_tokens=96, vocab=257, threads=1)
    )


@pytest.fixture
def engine(folder: Path) -> Iterator[ProcessEngine]:
    engine = ProcessEngine(setup_of(folder), waiting_limit=8, restarts=1)
    try:
        yield engine
    finally:
        engine.close()
        assert not psutil.pid_exists(engine.pid)


def greedy(id: str, max_tokens: int = 8) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=2)
    return Request(id=id, prompt=(1, 2, 3), params=params)


def over(message: dict[str, Any]) -> dict[str, Any]:
    """What a message is at the other end of a wire."""
    here, there = socket.socketpair()
    sender, receiver = Wire(here), Wire(there)
    sender.send(message)
    received = next(receiver.messages())
    sender.close()
    receiver.close()
    return received


def test_what_crosses_the_wire_arrives_as_it_was() -> None:
    params = SamplingParams(
        max_tokens=3,
        seed=-5,
        stop_ids=frozenset({1, 2}),
        logit_bias=((3, -1.5),),
        guide=Guide("regex", "a+"),
        logprobs=1,
    )
    request = Request(id="a", prompt=(1, 2), params=params, priority=-1, client="me")
    assert to_request(over(from_request(request))) == request
    token = Token(id=4, logprob=-0.5, top_logprobs=((4, -0.5), (5, -1.5)), finish_reason="stop")
    there = over(
        from_outcome(
            Outcome(items=[("a", token), ("b", EngineError("why"))], admitted=["c"], stats=Stats(steps=2))
        )
    )
    items = to_items(there["items"])
    assert items[0] == ("a", token)
    assert str(items[1][1]) == "why"
    assert (there["admitted"], Stats(**there["stats"])) == (["c"], Stats(steps=2))


def test_messages_come_whole_however_they_are_cut() -> None:
    messages = [{"n": number, "text": "x" * number * 10_000} for number in range(4)]
    here, there = socket.socketpair()
    for message in messages:
        Wire(here).send(message)
    data = there.recv(1 << 20)
    receiver, found = Wire(here), list[dict[str, Any]]()
    for start in range(0, len(data), 7_001):
        there.sendall(data[start : start + 7_001])
        found += receiver.receive()
    assert not receiver.receive()  # nothing more, and no end
    assert (found, receiver.ended) == (messages, False)
    there.close()
    assert not receiver.receive()
    assert receiver.ended
    receiver.close()


def test_what_it_says_before_it_goes_is_heard_first_and_in_order() -> None:
    here, there = socket.socketpair()
    engine, heard = Wire(there), list[Any]()
    loops: list[asyncio.AbstractEventLoop | None] = []

    def hear(messages: Sequence[dict[str, Any]]) -> None:
        heard.extend(message["n"] for message in messages)
        loops.append(asyncio._get_running_loop())

    async def run() -> None:
        ear = Ear(hear)
        ear.turn_to(wire := Wire(here))
        engine.send({"n": 0})
        await asyncio.sleep(0.01)
        assert not heard  # there was no loop to hear it
        ear.on_this_loop()
        while not heard:
            await asyncio.sleep(0)
        engine.send({"n": 1})
        engine.send({"n": 2})
        engine.close()
        await asyncio.to_thread(ear.finish, wire)
        await asyncio.sleep(0)
        assert wire.fileno() == -1

    asyncio.run(run())
    assert heard == [0, 1, 2]
    assert loops[0] is not None


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2,
    reason="there is one core, or no saying which",
)
def test_http_keeps_off_the_core_of_the_engine_and_a_new_one_gets_all(engine: ProcessEngine) -> None:
    cores = os.sched_getaffinity(0)

    async def run() -> None:
        for number in range(2):
            async for _ in engine.submit(greedy(str(number))):
                assert len(os.sched_getaffinity(0)) == len(cores) - 1
                with ThreadPoolExecutor(1, initializer=on_all_cores) as pool:
                    assert pool.submit(os.sched_getaffinity, 0).result() == cores
            assert os.sched_getaffinity(engine.pid) == cores
            if number == 0:
                os.kill(engine.pid, signal.SIGKILL)
                for ready in (True, False):
                    while engine.stats().ready is ready:
                        await asyncio.sleep(0.01)

    asyncio.run(run())
    engine.close()
    assert os.sched_getaffinity(0) == cores


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2,
    reason="there is one core, or no saying which",
)
def test_http_has_all_cores_while_it_is_behind() -> None:
    cores, apart = os.sched_getaffinity(0), Apart()
    core = min(cores)
    try:
        for steps, times, expected in ((1, 1, cores - {core}), (3, 64, cores), (1, 400, cores - {core})):
            for _ in range(times):
                apart.heard(steps, core)
            assert os.sched_getaffinity(0) == expected
    finally:
        apart.end()
    assert os.sched_getaffinity(0) == cores


def test_it_generates_is_killed_and_generates_again_until_it_gives_up(
    engine: ProcessEngine, folder: Path, reference: Any
) -> None:
    expected = reference(load_folder(folder / "hf"), [1, 2, 3], 8)
    ended = []
    engine.on_end = lambda: ended.append(True)

    async def answer(request: Request) -> list[int]:
        return [token.id async for token in engine.submit(request)]

    async def run() -> None:
        for crash in range(2):
            assert await answer(greedy(f"before {crash}")) == expected
            assert engine.stats().generated_tokens == 8
            running = engine.submit(greedy("killed", 90))
            await anext(running)
            pid = engine.pid
            os.kill(pid, signal.SIGKILL)
            last = crash == 1
            with pytest.raises(
                EngineError, match="killed by SIGKILL" + (", 2 times within" if last else "; send")
            ):
                async for _ in running:
                    pass
        assert engine.failure is not None
        with pytest.raises(EngineError, match="2 times"):
            engine.submit(greedy("after"))

    asyncio.run(run())
    engine.close()
    assert ended


def test_cancelling_and_closing_reach_the_process(engine: ProcessEngine) -> None:
    async def run() -> None:
        stream = engine.submit(greedy("a", 90))
        engine.submit(greedy("b", 90))
        await anext(stream)
        engine.cancel("a")
        assert len([token async for token in stream]) < 80
        engine.cancel("b")
        while engine.stats().running or engine.stats().used_blocks:
            await asyncio.sleep(0.01)
        last = engine.submit(greedy("c", 90))
        await anext(last)
        engine.close()
        with pytest.raises(EngineError, match="stopping"):
            async for _ in last:
                pass

    asyncio.run(asyncio.wait_for(run(), 60))
    assert not psutil.pid_exists(engine.pid)


def test_what_goes_wrong_at_the_start_is_said_here(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        ProcessEngine(setup_of(folder) | {"folder": str(tmp_path)})


def test_it_ends_with_its_parent(folder: Path) -> None:
    code = (
        "import sys, json, time; from muster.serve.engine.process import ProcessEngine\n"
        "print(ProcessEngine(json.loads(sys.argv[1])).pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(setup_of(folder))], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
