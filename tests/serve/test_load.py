"""`muster bench serve`: the same requests from the same seed, exact counts against a real server, and bad servers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from muster.model.transformer import Transformer
from muster.serve.load import drive, figures
from muster.serve.load.client import Outcome, Server
from muster.serve.load.workload import Workload, arrivals_s, requests
from tests.conftest import Muster

SMALL = Workload(requests=9, prompt_tokens=12, output_tokens=5, vocab=250)


def test_a_workload_follows_from_its_seed() -> None:
    asked = Workload(
        requests=40, prompt_tokens=10, output_tokens=8, shared_prefix_tokens=6, groups=2, spread=0.5, seed=3
    )
    sent = list(requests(asked))
    assert sent == list(requests(asked))
    prefixes = [request.prompt[:6] for request in sent]
    assert set(prefixes[0::2]) == {prefixes[0]}
    assert set(prefixes[1::2]) == {prefixes[1]}
    assert prefixes[0] != prefixes[1]
    assert {len(request.prompt) - 6 for request in sent} <= set(range(5, 16))
    assert {request.output_tokens for request in sent} <= set(range(4, 13))
    assert len({request.prompt for request in sent}) == 40


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals_s(4000, 50.0, seed=1)
    assert times[0] == 0
    assert times == sorted(times)
    assert times == arrivals_s(4000, 50.0, seed=1)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.1)  # as of an exponential distribution


def ignore(_: Outcome) -> None:
    pass


def test_every_token_is_counted(served: Any) -> None:
    outcomes = asyncio.run(
        drive.closed_loop(Server(served.url), "tiny", list(requests(SMALL)), concurrency=4, tell=ignore)
    )
    assert [outcome.number for outcome in outcomes] == list(range(9))
    assert all(outcome.succeeded for outcome in outcomes), outcomes
    assert {(outcome.prompt_tokens, outcome.output_tokens) for outcome in outcomes} == {(12, 5)}
    assert all(outcome.due_s <= outcome.arrived_s[0] <= outcome.ended_s for outcome in outcomes)
    found = figures.summarize(outcomes, figures.Objective())
    assert (found["succeeded"], found["prompt_tokens"], found["output_tokens"]) == (9, 108, 45)
    assert found["goodput_requests_per_s"] == found["requests_per_s"]
    strict = figures.summarize(outcomes, figures.Objective(ttft_s=0.0))
    assert strict["goodput_requests_per_s"] == 0


def test_refusals_are_counted_apart(serving: Any, model: Transformer) -> None:
    """An open loop goes on sending to a server that has no room."""
    long = Workload(requests=24, prompt_tokens=4, output_tokens=80, vocab=250)
    with serving(model, streams=1, waiting_limit=1) as full:
        outcomes = asyncio.run(
            drive.open_loop(Server(full.url), "tiny", list(requests(long)), rate=1000.0, seed=0, tell=ignore)
        )
    found = figures.summarize(outcomes, figures.Objective())
    assert found["succeeded"] >= 1
    assert found["refused"] >= 1
    assert found["succeeded"] + found["refused"] == 24
    assert found["errors"] == []


@contextmanager
def saying(answer: bytes) -> Iterator[str]:
    """The address of a server that says this to whoever asks, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        host, port = listening.getsockname()
        try:
            yield f"http://{host}:{port}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(10)


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "closed"),
        (b"nonsense\r\n\r\n", "illegal"),
        (HEAD + b"20\r\ndata: {}\r\n", "incomplete"),  # dies in the middle of an answer
        (HEAD + b"a\r\ndata: {x}\n\r\n0\r\n\r\n", "Expecting"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 4\r\n\r\nboom", "boom"),
    ],
)
def test_a_bad_answer_is_a_failed_request(answer: bytes, said: str) -> None:
    with saying(answer) as url:
        (outcome,) = asyncio.run(
            drive.closed_loop(Server(url), "m", list(requests(SMALL))[:1], concurrency=1, tell=ignore)
        )
    assert not outcome.succeeded
    assert said in outcome.error
    found = figures.summarize([outcome], figures.Objective())
    assert (found["failed"], found["ttft_s"]) == (1, {})
    assert figures.lines(found)[-1].endswith(outcome.error)


def test_the_command(served: Any, muster: Muster, tmp_path: Path) -> None:
    report, plot = tmp_path / "figures.json", tmp_path / "figures.svg"
    code, out, said = muster(
        "bench", "serve", served.url, "--requests", 6, "--concurrency", 3, "--prompt-tokens", 8,
        "--output-tokens", 4, "--shared-prefix", 10, "--slo-ttft", "1m", "--json", report, "--plot", plot,
    )  # fmt: skip
    assert code == 0, said
    assert out.startswith("6 of 6 requests answered in")
    assert "time to first token" in out
    found = json.loads(report.read_text())
    assert (found["prompt_tokens"], found["output_tokens"]) == (6 * 18, 6 * 4)
    assert found["objective"] == {"ttft_s": 60.0, "tpot_s": None}
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", 1, "--concurrency", 1], "give one of them"),
        (["--requests", 0], "--requests 0 should be at least 1"),
        (["--rate", 0], "--rate 0 should be more than 0"),
        (["--spread", 1], "should be from 0 to less than 1"),
        (["--slo-ttft", "soon"], "--slo-ttft"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[Any], said: str, muster: Muster) -> None:
    code, _, error = muster("bench", "serve", "http://127.0.0.1:9", *arguments)
    assert code == 2
    assert said in error


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://"])
def test_an_address_is_a_url(url: str, muster: Muster) -> None:
    code, _, error = muster("bench", "serve", url)
    assert code == 2
    assert "write http://127.0.0.1:8000" in error


def test_nobody_there(muster: Muster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    code, _, error = muster("bench", "serve", f"http://127.0.0.1:{port}")
    assert code == 1
    assert "is it running?" in error
